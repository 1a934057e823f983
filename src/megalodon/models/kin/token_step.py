"""One token of each of several sequences through all blocks of a kin model in one compiled call: what decoding runs.

For blocks whose mixers are among `WAYS`; they make queries, keys and values as Llama does. As with Gecko's step, the
kernel reads the weights where they lie, and a module whose forward pass is not ours alone is never bypassed:
`TokenStep.of` says None, and the caller takes the long way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from megalodon import ops
from megalodon.models.causal_lm import StatefulModel
from megalodon.models.kin.block import GELU, FinalLayerNorm, FinalNorm, KinBlock, SwiGLU
from megalodon.models.kin.mixers.attention import Attention
from megalodon.models.kin.mixers.base import Memory
from megalodon.models.kin.mixers.feature_maps import HeadwiseMap
from megalodon.models.kin.mixers.hedgehog import Hedgehog
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues
from megalodon.models.kin.mixers.lolcats import LoLCATs
from megalodon.models.kin.mixers.projected import Projected
from megalodon.models.kin.mixers.rotary import Rotary
from megalodon.models.kin.mixers.sliding_attention import SlidingAttention
from megalodon.models.kin.mixers.sums import WeightedSums, WindowedSums
from megalodon.models.kin.mixers.sums import WindowMemory as LastPlaces
from megalodon.models.kin.mixers.window_memory import ChunksAndMemory, WindowMemory
from megalodon.models.kin.state import KinDimensions, KinState
from megalodon.models.layers.few_rows import can_fuse
from megalodon.models.layers.step_tables import StepTables
from megalodon.models.layers.watch import Prepared, is_forwarded_as_written
from megalodon.ops.backend import backend_for
from megalodon.ops.compiled import tables
from megalodon.ops.compiled.tables import KinMemory
from megalodon.ops.linear_attention.feature_maps import softmax_both

KERNEL = "kin_step.blocks"
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


class Way:
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

    def place(self, position: int) -> Any:
        """What all rows must have in common, of how many tokens each has read; None: nothing."""
        return None

    def open(self, memory: Any, position: int, dtype: torch.dtype) -> Opened:
        """For a token after `position` others, of activations in `dtype`."""
        raise NotImplementedError

    def close(self, memory: Any, opened: Opened, position: int) -> Memory:
        """The memory after the token."""
        raise NotImplementedError


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


def _maps(mixer: Any) -> dict[str, Tensor]:
    return {"map_q": mixer.feature_map_q.weight, "map_k": mixer.feature_map_k.weight}


WAYS: dict[type[Projected], type[Way]] = {
    Attention: _Everything,
    SlidingAttention: _Last,
    WindowMemory: _Chunks,
    LoLCATs: _Shared,
    Hedgehog: _Sums,
}
"""By the mixer's class."""


class TokenStep:
    """A model's blocks and final norm for one token a row; made anew when a weight has changed."""

    @torch.no_grad()
    def __init__(self, model: StatefulModel) -> None:
        """Of what `_step_of` has looked at."""
        config, blocks = model.config, list(_blocks(model))
        self.sizes = cast(KinDimensions, model.dimensions)
        self.ways = [WAYS[type(block.mixer)](block.mixer) for block in blocks]
        self._heads, size = config.num_heads, config.head_size
        self._rotary = Rotary.of(config)
        self._frequencies = _frequencies(self._rotary)
        self._eps = np.array([_only(norms) for norms in _norms(model)])
        own = [way.weights() for way in self.ways]
        self._features = max((2 * x["map_q"].shape[-1] for x in own if "map_q" in x), default=0)
        self._tables = StepTables(
            KERNEL,
            len(blocks),
            _linear_layers(model),
            (config.model_dim, config.num_heads * size, config.key_value_heads * size, config.ffn_hidden_dim, self._heads),
            pairs=len(self._frequencies),
            eps=self._eps.ctypes.data,
            layer_norms=int(config.norm == "layer"),
            parallel=int(config.parallel),
            gelu=int(config.feed_forward == "gelu"),
            most_features=self._features,
        )
        for number, (block, way, weights) in enumerate(zip(blocks, self.ways, own, strict=True)):
            self._write_block(number, block, way, weights)
        self._write_norm(-1, "norm", model.final_norm)

    def _write_block(self, number: int, block: KinBlock, way: Way, weights: dict[str, Tensor]) -> None:
        mixer, numbers = cast(Projected, block.mixer), {"mixer": way.mixer}
        self._tables.write_layers(number, dict(_layers_of(block)))
        self._write_norm(number, "norm", block.mixer_norm)
        self._write_norm(number, "ffn", block.feed_forward_norm)
        if mixer.head_norms is not None:
            numbers["head_norm"] = 1 if isinstance(mixer.head_norms["q"], nn.RMSNorm) else 2
            for name in "qk":
                self._write_norm(number, f"head_{name}", mixer.head_norms[name])
        if "map_q" in weights:
            numbers["columns"] = weights["map_q"].shape[-1]
        self._tables.write(number, **weights)
        self._tables.set(number, **numbers)

    def _write_norm(self, number: int, name: str, norm: Any) -> None:
        if norm is not None:
            self._tables.write(number, **{f"{name}_scale": norm.weight, f"{name}_bias": getattr(norm, "bias", None)})

    @staticmethod
    def of(model: StatefulModel, x: Tensor, state: KinState | None) -> TokenStep | None:
        """The step of the model's weights as they are now, for embeddings x [B, L, D]; None where it is not for them.

        It is for one token of rows that stand at the same places of what their layers remember (the same number of
        tokens where a layer keeps all, the same place of a chunk where there are chunks) and not at the start of a
        document, without gradients, autocast or a compiler at work, on a CPU that has kernels. After any other pass a
        generation starts (see `watch`); a pass with gradients says that weights are about to change.
        """
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() or model.training:
            _STEPS.forget(model)
            return None
        if not _is_next_token(x, state) or backend_for(x.device, x.dtype)[0] != "numba":
            _STEPS.start(model)
            return None
        step = _STEPS.of(model)
        return step if step is not None and state is not None and step._is_even(state) else None

    def _is_even(self, state: KinState) -> bool:
        positions = set(state.position.tolist())
        return len(positions) == 1 or all(len({way.place(p) for p in positions}) == 1 for way in self.ways)

    def advance(self, x: Tensor, state: KinState) -> tuple[Tensor, KinState]:
        """Embeddings x [M, D] and the state before them, which `of` has looked at.

        Returns:
            (the final hidden states [M, D] in the dtype of x, the state after them).
        """
        position = int(state.position[0])
        opened = [
            way.open(memory, position, x.dtype) for way, memory in zip(self.ways, state.layers, strict=True)
        ]
        out = self._run(x, opened, state.position)
        layers = [
            way.close(memory, each, position)
            for way, memory, each in zip(self.ways, state.layers, opened, strict=True)
        ]
        return out, KinState(layers, None, state.position + 1, self.sizes)

    def _run(self, x: Tensor, opened: list[Opened], position: Tensor) -> Tensor:
        rows, memory = len(x), np.zeros((len(opened), len(KinMemory)), np.int64)
        for row, each in zip(memory, opened, strict=True):
            for name, value in each.row.items():
                row[getattr(KinMemory, name)] = value
        wide = x.to(torch.float32, copy=True).contiguous()
        out, offsets = torch.empty_like(wide), position.contiguous()
        amplitude = 1.0 if self._rotary is None else self._rotary.amplitude
        angles = offsets[:, None].double() * self._frequencies
        turns = torch.polar(torch.full_like(angles, amplitude), angles).to(torch.complex64)
        seen = max(each.row.get("before", 0) + each.row.get("places", 0) for each in opened)
        capacity = -(-seen // 16) * 16
        scratch = torch.empty(tables.kin_scratch_size(rows, *self._tables.widths, capacity, self._features))
        self._tables.run(
            rows,
            capacity=capacity,
            memory=memory.ctypes.data,
            key_kind=tables.KINDS[x.dtype],
            x=wide.data_ptr(),
            out=out.data_ptr(),
            offsets=offsets.data_ptr(),
            turns=turns.data_ptr(),
            scratch=scratch.data_ptr(),
        )
        return out.to(x.dtype)


def _frequencies(rotary: Rotary | None) -> Tensor:
    """float64 [pairs]: radians a token."""
    if rotary is None:
        return torch.zeros(0, dtype=torch.float64)
    if rotary.frequencies is not None:
        return torch.tensor(rotary.frequencies, dtype=torch.float64)
    return rotary.base ** (-torch.arange(0, rotary.size, 2, dtype=torch.float64) / rotary.size)


_PARTS = KinBlock, SwiGLU, GELU, HeadwiseMap, nn.RMSNorm, nn.LayerNorm, FinalNorm, FinalLayerNorm, nn.Linear
_OURS = (*_PARTS, *WAYS)


def _blocks(model: StatefulModel) -> Iterator[KinBlock]:
    return iter(cast(Any, model.layers))


def _layers_of(block: KinBlock) -> Iterator[tuple[str, nn.Module]]:
    """The block's large linear layers, by their names in `Weights`."""
    mixer, inner = cast(Projected, block.mixer), block.feed_forward
    yield from (("query", mixer.q_proj), ("key", mixer.k_proj), ("v", mixer.v_proj), ("o", mixer.o_proj))
    if isinstance(inner, SwiGLU):  # what passes silu is `up` to the kernel
        yield from (("up", inner.gate_proj), ("gate", inner.up_proj), ("down", inner.down_proj))
    elif inner is not None:
        yield from (("up", inner.up_proj), ("down", inner.down_proj))


def _linear_layers(model: StatefulModel) -> list[nn.Module]:
    return [layer for block in _blocks(model) for _, layer in _layers_of(block)]


def _norms(model: StatefulModel) -> list[list[Any]]:
    """The norms of each kind, as `Call.eps` has them: before mixers, the last one, of heads, before feed-forward."""
    blocks = list(_blocks(model))
    heads = [norm for b in blocks for norm in (cast(Any, b.mixer).head_norms or {}).values()]
    before = [[getattr(b, name) for b in blocks] for name in ("mixer_norm", "feed_forward_norm")]
    mixer, feed_forward = ([norm for norm in norms if norm is not None] for norms in before)
    return [mixer, [model.final_norm], heads, feed_forward]


def _only(norms: list[Any]) -> float:
    return float(norms[0].eps) if norms else 0.0


def _bypassed(model: StatefulModel) -> Iterator[nn.Module]:
    """The modules that a step does not call."""
    yield model.final_norm
    for block in _blocks(model):
        linear = {id(layer) for _, layer in _layers_of(block)}
        yield from (module for module in block.modules() if id(module) not in linear)


def _is_next_token(x: Tensor, state: KinState | None) -> bool:
    """Whether x [B, 1, D] is one token of rows that go on."""
    if x.shape[1] != 1 or state is None or torch.is_autocast_enabled(x.device.type):
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and min(state.position.tolist(), default=0) > 0


def _copied_weights(model: StatefulModel) -> list[Tensor]:
    """The weights that a step takes copies of, or makes into something else."""
    weights: list[Tensor] = [weight for module in _bypassed(model) for weight in module.parameters(recurse=False)]
    return weights + [bias for layer in _linear_layers(model) if (bias := cast(Any, layer).bias) is not None]


def _step_of(model: StatefulModel) -> tuple[TokenStep | None, list[Tensor]]:
    for block in _blocks(model):
        way = WAYS.get(cast(Any, type(block.mixer)))
        if type(block) is not KinBlock or way is None or not way.fits(block.mixer) or block.feed_forward is None:
            return None, []
    if model.config.two_way or any(len({norm.eps for norm in norms}) > 1 for norms in _norms(model)):
        return None, []
    if not all(_is_ours(module) for module in _bypassed(model)):
        return None, []
    if not can_fuse(_linear_layers(model), model.dtype, KERNEL):
        return None, []
    return TokenStep(model), _copied_weights(model)


def _is_ours(module: nn.Module) -> bool:
    if type(module) is nn.ModuleDict:  # never called
        return True
    return not module.training and is_forwarded_as_written(module, _OURS)


_STEPS: Prepared[StatefulModel, TokenStep | None] = Prepared(_step_of)


def generation_starts(model: StatefulModel) -> None:
    """Before the next token, look at every weight: it may have changed without a trace."""
    _STEPS.start(model)
