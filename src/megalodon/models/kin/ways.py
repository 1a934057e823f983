"""How each mixer's memory goes through the kernel of `token_step`: what it reads, what it fills, what comes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from megalodon import ops
from megalodon.models.kin.mixers.attention import Attention
from megalodon.models.kin.mixers.base import Memory
from megalodon.models.kin.mixers.hedgehog import Hedgehog
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues
from megalodon.models.kin.mixers.lolcats import LoLCATs
from megalodon.models.kin.mixers.projected import Projected
from megalodon.models.kin.mixers.retention import Retention
from megalodon.models.kin.mixers.sliding_attention import SlidingAttention
from megalodon.models.kin.mixers.sums import Sums, WeightedSums, WindowedSums
from megalodon.models.kin.mixers.sums import WindowMemory as LastPlaces
from megalodon.models.kin.mixers.window_memory import ChunksAndMemory, WindowMemory
from megalodon.ops.compiled import tables
from megalodon.ops.linear_attention.feature_maps import softmax_both

_SMALL_WINDOW = 8
"""Places below which one too many is more than a memory may keep alive."""


class Opened(NamedTuple):
    """What a kernel is to read and to fill for a block.

    Attributes:
        row: of its table, by the names of `KinMemory`.
        new: what it fills: tensors, or a memory. read: what must live until it has.
    """

    row: dict[str, int]
    new: Any
    read: list[Tensor]

    @staticmethod
    def places(keys: Tensor, values: Tensor, dropped: int, dtype: torch.dtype) -> Opened:
        """Keys and values [M, n, G, ...] without the first `dropped`, and one place more for the token's."""
        old = _contiguous(dtype, keys, values)
        rows, count, groups, width = old[0].shape
        room = count + 1 - dropped
        new = [part.new_empty(rows, room, groups, part.shape[3]) for part in old]
        row = {"keys": new[0].data_ptr(), "values": new[1].data_ptr(), "room": room, "places": room, "width": width}
        if count:
            row |= {"old_keys": old[0].data_ptr(), "old_values": old[1].data_ptr(), "old": count, "dropped": dropped}
        return Opened(row, new, old)

    @staticmethod
    def sums(sums: Tensor, weights: Tensor) -> Opened:
        """Sums [M, H, f, d] and what normalises them [M, H, f]."""
        old = _contiguous(torch.float32, sums, weights)
        new = [torch.empty_like(part) for part in old]
        names = ("sums_in", "weights_in", "sums_out", "weights_out")
        return Opened({name: x.data_ptr() for name, x in zip(names, (*old, *new), strict=True)}, new, old)

    def beside(self, other: Opened) -> Opened:
        """Both in one block."""
        return Opened(self.row | other.row, self.new + other.new, self.read + other.read)


def _contiguous(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.to(dtype).contiguous() for x in tensors]


class Way(ABC):
    """How a kind of mixer goes through the kernel.

    Class attributes:
        mixer: what `Weights.mixer` says of it.
    """

    mixer: ClassVar[int] = tables.SOFTMAX

    def __init__(self, mixer: Any) -> None:
        self.of = mixer

    @staticmethod
    def fits(mixer: Any) -> bool:
        """Whether the kernel knows this mixer's options."""
        return True

    def weights(self) -> dict[str, Tensor]:
        """Its own, by the names of `Weights`, made into what the kernel reads."""
        return {}

    def features(self) -> int:
        """Numbers that a head asks with."""
        return 2 * self.weights()["map_q"].shape[-1] if "map_q" in self.weights() else 0

    def layers(self) -> dict[str, nn.Module]:
        """Its large linear layers beside those that all have, by the names of `Weights`."""
        return {}

    def place(self, position: int) -> Any:
        """What all rows must have in common, of how many tokens each has read; None: nothing."""
        return None

    @abstractmethod
    def open(self, memory: Any, position: int, dtype: torch.dtype) -> Opened:
        """For a token after `position` others, of activations in `dtype`."""

    @abstractmethod
    def close(self, memory: Any, opened: Opened, position: int) -> Memory:
        """The memory after the token."""


class _Everything(Way):
    """`Attention`: the one that writes in place, behind what any holder of the memory sees."""

    def place(self, position: int) -> int:
        return position

    def open(self, memory: KeysAndValues, position: int, dtype: torch.dtype) -> Opened:
        after = memory.with_place(position, dtype)
        assert after.room is not None
        keys, values = after.room.keys, after.room.values
        row = {"keys": keys.data_ptr(), "values": values.data_ptr(), "room": keys.shape[1], "width": keys.shape[3]}
        return Opened(row | {"places": position + 1}, after, [])

    def close(self, memory: KeysAndValues, opened: Opened, position: int) -> KeysAndValues:
        return opened.new


class _Last(Way):
    """`SlidingAttention`."""

    def open(self, memory: LastPlaces, position: int, dtype: torch.dtype) -> Opened:
        return Opened.places(memory.keys, memory.values, 0, dtype)

    def close(self, memory: LastPlaces, opened: Opened, position: int) -> LastPlaces:
        after = LastPlaces(*(part[:, 1:] for part in opened.new))
        return after.own() if self.of.window < _SMALL_WINDOW else after


class _Chunks(Way):
    """`WindowMemory`."""

    mixer = tables.CHUNKS

    def weights(self) -> dict[str, Tensor]:
        heads, gate = self.of.num_heads, self.of.gate_proj
        maps = {"map_q": self.of.memory_maps[:heads], "map_k": self.of.memory_maps[heads:]}
        return {**maps, "opening": gate.weight, "opening_bias": gate.bias}

    def place(self, position: int) -> tuple[int, int]:
        return position % self.of.chunk_size, min(position // self.of.chunk_size, 2)

    def open(self, memory: ChunksAndMemory, position: int, dtype: torch.dtype) -> Opened:
        chunk, offset = divmod(position, self.of.chunk_size)
        opened = Opened.places(memory.keys[:, :offset], memory.values[:, :offset], 0, dtype)
        read, row = [], {}
        if chunk:
            size = self.of.chunk_size
            read = _contiguous(dtype, memory.before_keys[:, :size], memory.before_values[:, :size])
            row = {"before_keys": read[0].data_ptr(), "before_values": read[1].data_ptr(), "before": size}
        if chunk > 1:
            read += _contiguous(torch.float32, memory.working)
            row["matrix"] = read[-1].data_ptr()
        return opened.beside(Opened(row, [], read))

    def close(self, memory: ChunksAndMemory, opened: Opened, position: int) -> ChunksAndMemory:
        (chunk, offset), (keys, values) = divmod(position, self.of.chunk_size), opened.new
        before_keys, before_values = memory.before_keys, memory.before_values
        working, mass = memory.working, memory.log_mass
        if offset + 1 < self.of.chunk_size:
            return ChunksAndMemory(keys, values, before_keys, before_values, working, mass)
        if chunk:
            if chunk == 1:  # whatever a row holds that has absorbed nothing, it is not read
                working, mass = torch.zeros_like(working), torch.full_like(mass, -torch.inf)
            offered = before_keys[..., self.of.head_dim :].to(keys.dtype)
            parts = (x.split(1) for x in (offered, before_values, working, mass))
            # row by row: products of several could add up in another order, and a row's bits are its own
            rows = [ops.absorb(k[None], v[None], m, u, [1]) for k, v, m, u in zip(*parts, strict=True)]
            working, mass = (torch.cat(column) for column in zip(*rows, strict=True))
        return ChunksAndMemory(keys[:, :0], values[:, :0], keys, values, working, mass)


class _Shared(Way):
    """`LoLCATs`."""

    mixer = tables.SHARED

    def weights(self) -> dict[str, Tensor]:
        share = torch.sigmoid(self.of.window_logit.float())
        rest = 1 - share if self.of.affine else torch.ones_like(share)
        return {**_maps(self.of), "share": share, "rest": rest}

    def open(self, memory: WindowedSums, position: int, dtype: torch.dtype) -> Opened:
        places = Opened.places(memory.keys, memory.values, 1, dtype)
        return places.beside(Opened.sums(memory.sums, memory.weights))

    def close(self, memory: WindowedSums, opened: Opened, position: int) -> WindowedSums:
        keys, values, sums, weights = opened.new
        return WindowedSums(sums, weights, keys, values)


class _Sums(Way):
    """`Hedgehog`."""

    mixer = tables.SUMS

    @staticmethod
    def fits(mixer: Hedgehog) -> bool:
        return all(x.activation is softmax_both and not x.skip for x in mixer.maps()) and not mixer.two_way

    def weights(self) -> dict[str, Tensor]:
        return {**_maps(self.of), "sums_eps": torch.tensor([self.of.eps])}

    def open(self, memory: WeightedSums, position: int, dtype: torch.dtype) -> Opened:
        return Opened.sums(memory.sums, memory.weights)

    def close(self, memory: WeightedSums, opened: Opened, position: int) -> WeightedSums:
        return WeightedSums(*opened.new)


class _Retained(Way):
    """`Retention`."""

    mixer = tables.RETENTION

    @staticmethod
    def fits(mixer: Retention) -> bool:
        return mixer.q_norm is None and mixer.head_norms is None

    def weights(self) -> dict[str, Tensor]:
        slopes = self.of.slopes or [0.0] * self.of.num_heads
        return {"decay": torch.tensor(slopes).neg().exp(), "sums_eps": torch.tensor([self.of.norm_eps])}

    def features(self) -> int:
        return self.of.head_dim

    def layers(self) -> dict[str, nn.Module]:
        own = self.of.feature_q if self.of.feature_k is None else self.of.feature_k
        return {"feature_q": self.of.feature_q, "feature_k": own}

    def open(self, memory: Sums, position: int, dtype: torch.dtype) -> Opened:
        old = _contiguous(torch.float32, memory.sums)
        new = [torch.empty_like(part) for part in old]
        return Opened({"sums_in": old[0].data_ptr(), "sums_out": new[0].data_ptr()}, new, old)

    def close(self, memory: Sums, opened: Opened, position: int) -> Sums:
        return Sums(*opened.new)


def _maps(mixer: Any) -> dict[str, Tensor]:
    return {"map_q": mixer.feature_map_q.weight, "map_k": mixer.feature_map_k.weight}


WAYS: dict[type[Projected], type[Way]] = {
    Attention: _Everything,
    SlidingAttention: _Last,
    WindowMemory: _Chunks,
    LoLCATs: _Shared,
    Hedgehog: _Sums,
    Retention: _Retained,
}
"""By the mixer's class."""


def way_of(mixer: Any) -> Way:
    """That of a mixer whose class is in `WAYS`."""
    return WAYS[type(mixer)](mixer)
