"""All that a sequence remembers: the one memory of training, generation and saved contexts.

A state is a value. Running a model on it never changes it, so it can be used again (a fork). Its size does not depend
on how much was read: per layer the norm's moments, CEMA's h, and the keys and values of the chunk that is still open.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalodon.models.layers.timestep_norm import Moments
from megalodon.models.megalodon.config import MegalodonConfig
from megalodon.ops.layout import Layout, move_rows

FORMAT = "megalodon-state-1"
"""What a saved state's metadata says under `format`."""


class OpenChunk:
    """Rotated keys and values of the chunk that each row is in, at the start of two buffers.

    Appending in place is safe only for the latest holder of a buffer: whoever appended last. Holders share a counter of
    appends; one whose own number is behind copies instead. So every holder keeps seeing what it held.
    """

    def __init__(self, keys: Tensor, values: Tensor, appends: list[int] | None = None) -> None:
        self.keys, self.values = keys, values
        self._appends = [0] if appends is None else appends
        self._number = self._appends[0]

    @staticmethod
    def append(chunk: OpenChunk | None, k: Tensor, v: Tensor, layout: Layout) -> OpenChunk:
        """The chunk with the tokens k [B, L, H, d] and v [B, L, H, e], which must fit (`layout.fits_open_chunk`)."""
        needed = layout.most_keys
        if chunk is None:
            chunk = OpenChunk(k[:, :0], v[:, :0])
        differentiable = torch.is_grad_enabled() and (k.requires_grad or chunk.keys.requires_grad)
        capacity = needed if differentiable else _capacity(needed, layout.chunk_size)
        # where a chunk begins, its places hold what earlier holders still see
        if layout.begins_chunk or differentiable or not chunk._writable(needed, k, v):
            chunk = chunk._grown(layout.longest_offset, capacity, k, v)
        chunk._appends[0] += 1
        offset = layout.uniform_offset
        if offset is not None:
            chunk.keys[:, offset : offset + layout.length] = k
            chunk.values[:, offset : offset + layout.length] = v
        else:
            rows, tokens = np.nonzero(np.arange(layout.length) < layout.lengths[:, None])
            places = torch.from_numpy(layout.offsets[rows] + tokens).to(k.device)
            row, token = torch.from_numpy(rows).to(k.device), torch.from_numpy(tokens).to(k.device)
            chunk.keys[row, places] = k[row, token].to(chunk.keys.dtype)
            chunk.values[row, places] = v[row, token].to(chunk.values.dtype)
        return OpenChunk(chunk.keys, chunk.values, chunk._appends)

    def with_token(self, k: Tensor, v: Tensor, offset: int, chunk_size: int) -> OpenChunk:
        """`append` without gradients of one token, k [B, H, d] and v [B, H, e], to rows that all hold `offset`."""
        chunk = self.with_room(k, v, offset, chunk_size)
        chunk.keys[:, offset], chunk.values[:, offset] = k, v
        return chunk

    def with_room(self, k: Tensor, v: Tensor, offset: int, chunk_size: int) -> OpenChunk:
        """What `with_token` returns, before the token is written; k and v only say how many rows and which dtypes."""
        chunk, needed = self, offset + 1
        if offset == 0 or not self._writable(needed, k, v):
            chunk = self._grown(offset, _capacity(needed, chunk_size), k, v)
        chunk._appends[0] += 1
        return OpenChunk(chunk.keys, chunk.values, chunk._appends)

    @staticmethod
    def after(chunk: OpenChunk | None, k: Tensor, v: Tensor, layout: Layout) -> OpenChunk:
        """What is left open once the tokens k, v are read, where chunks were completed or documents begun."""
        if chunk is None:
            chunk = OpenChunk(k[:, :0], v[:, :0])
        assert layout.chunk_size is not None
        if layout.uniform_offset is not None:
            width = (layout.uniform_offset + layout.length) % layout.chunk_size
            if width <= layout.length:
                last = OpenChunk(k[:, layout.length - width :], v[:, layout.length - width :])
                exact = not width or (torch.is_grad_enabled() and k.requires_grad)
                return last._grown(width, width if exact else _capacity(width, layout.chunk_size), k, v)
        batch, cached_width = layout.batch, layout.longest_offset
        cached, cached_target, token, token_target, left = layout.open_chunk()
        width = int(left.max(initial=0))

        def keep(old: Tensor, new: Tensor) -> Tensor:
            kept = move_rows(new.flatten(0, 1), token, token_target, batch * max(width, 1))
            if cached.numel():
                old = old[:, :cached_width].flatten(0, 1).to(new.dtype)
                kept = kept + move_rows(old, cached, cached_target, batch * max(width, 1))
            return kept.unflatten(0, (batch, -1))[:, :width]

        return OpenChunk(keep(chunk.keys, k), keep(chunk.values, v))

    def contents(self, layout: Layout) -> tuple[Tensor, Tensor, int | Tensor]:
        """(keys, values, where the newest tokens begin: one number, or int64 [B] where rows differ), for attention."""
        filled = layout.most_keys
        offset: int | Tensor | None = layout.uniform_offset
        if offset is None:
            offset = torch.from_numpy(layout.offsets).to(self.keys.device)
            filled = max(filled, layout.longest_offset + layout.length)
            missing = filled - self.keys.shape[1]
            if missing > 0:  # padding tokens may stand beyond every key: give them something to see
                keys, values = (torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1) for x in self)
                return keys, values, offset
        return self.keys[:, :filled], self.values[:, :filled], offset

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.keys, self.values))

    def map(self, function: Callable[[Tensor], Tensor]) -> OpenChunk:
        """A chunk of its own, with copies of what `function` makes of keys and values."""
        return OpenChunk(function(self.keys).clone(), function(self.values).clone())

    def detach(self) -> OpenChunk:
        """The same chunk without its history; the buffers stay shared."""
        chunk = OpenChunk(self.keys.detach(), self.values.detach(), self._appends)
        chunk._number = self._number
        return chunk

    def _writable(self, needed: int, k: Tensor, v: Tensor) -> bool:
        return (
            self._number == self._appends[0]
            and self.keys.shape[1] >= needed
            and (self.keys.dtype, self.values.dtype) == (k.dtype, v.dtype)
            and not self.keys.requires_grad
            and not (self.keys.is_inference() and not torch.is_inference_mode_enabled())
        )

    def _grown(self, used: int, capacity: int, k: Tensor, v: Tensor) -> OpenChunk:
        """A copy in new buffers; empty places are zero, so that hidden keys have finite scores."""

        def grow(old: Tensor, new: Tensor) -> Tensor:
            empty = new.new_zeros(len(new), capacity - used, *old.shape[2:])
            return torch.cat([old[:, :used].to(new.dtype), empty], dim=1)

        return OpenChunk(grow(self.keys, k), grow(self.values, v))


def _capacity(needed: int, chunk_size: int | None) -> int:
    """Places of a new buffer: room to grow in, at most a chunk."""
    return min(chunk_size or needed, max(2 * needed, 16))


class LayerState(NamedTuple):
    """One layer's memory: the norm's moments [B, G], CEMA's h complex [B, D, N], the open chunk."""

    moments: Moments
    cema: Tensor
    chunk: OpenChunk

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """A state with copies of what `function` makes of each tensor."""
        return LayerState(
            Moments(*(function(x).clone() for x in self.moments)), function(self.cema).clone(), self.chunk.map(function)
        )

    def detach(self) -> LayerState:
        """The same state without its history."""
        return LayerState(Moments(*(x.detach() for x in self.moments)), self.cema.detach(), self.chunk.detach())


@dataclass(frozen=True)
class Dimensions:
    """The sizes that a state and its model must share."""

    num_layers: int
    model_dim: int
    cema_ndim: int
    norm_num_groups: int
    num_heads: int
    head_dim: int
    value_head_dim: int
    chunk_size: int
    rope_base: float
    norm_prior_count: int

    @staticmethod
    def of(config: MegalodonConfig) -> Dimensions:
        """The sizes of a model."""
        return Dimensions(**{name: getattr(config, name) for name in Dimensions.__dataclass_fields__})

    def check(self, other: Dimensions) -> None:
        """Raise ValueError, naming every field that differs, unless a state of `self` fits a model of `other`."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        differing = [f"{name} {mine} (the model has {theirs})" for name, mine, theirs in pairs if mine != theirs]
        if differing:
            raise ValueError(f"past_key_values is the state of another model: {', '.join(differing)}")


class MegalodonState:
    """The memory of a batch of sequences.

    Attributes:
        layers: one `LayerState` a layer.
        final: the final norm's moments.
        position: int64 [B], on the CPU; tokens of its current document that each row has read.
        dimensions: the sizes of the model it belongs to.
    """

    is_compileable = False

    def __init__(self, layers: Sequence[LayerState], final: Moments, position: Tensor, dimensions: Dimensions) -> None:
        self.layers, self.final, self.position, self.dimensions = tuple(layers), final, position, dimensions

    # --- size and place -------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.position)

    @property
    def device(self) -> torch.device:
        """Where the tensors are; `position` stays on the CPU."""
        return self.final.mean.device

    @property
    def open_tokens(self) -> Tensor:
        """int64 [B]; tokens in each row's open chunk."""
        return self.position % self.dimensions.chunk_size

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered; at most a constant, least when no chunk is open."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def __len__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        return f"MegalodonState(batch_size={self.batch_size}, position={self.position.tolist()}, nbytes={self.nbytes})"

    # --- values made of it ----------------------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> MegalodonState:
        """A state with copies of what `function` makes of each tensor; `function` keeps the batch as it is."""
        return MegalodonState(
            [layer.map(function) for layer in self.layers],
            Moments(*(function(x).clone() for x in self.final)),
            self.position.clone(),
            self.dimensions,
        )

    def clone(self) -> MegalodonState:
        """A copy that shares nothing."""
        return self.map(lambda x: x)

    def detach(self) -> MegalodonState:
        """The same memory without gradients: where truncated back-propagation cuts."""
        final = Moments(*(x.detach() for x in self.final))
        return MegalodonState([layer.detach() for layer in self.layers], final, self.position, self.dimensions)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MegalodonState:
        """A copy on `device`. `dtype` is that of keys and values; statistics and h keep their precision."""
        moved = self.map(lambda x: x.to(device) if device is not None else x)
        if dtype is not None:
            layers = [layer._replace(chunk=layer.chunk.map(lambda x: x.to(dtype))) for layer in moved.layers]
            moved = MegalodonState(layers, moved.final, moved.position, moved.dimensions)
        return moved

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> MegalodonState:
        """The state of some rows, in the order given; an int keeps a batch of one; a bool mask selects."""
        index = torch.arange(self.batch_size)[torch.as_tensor(rows) if not isinstance(rows, slice) else rows]
        index = index.reshape(-1)
        selected = self.map(lambda x: x.index_select(0, index.to(x.device)))
        selected.position = self.position[index]
        return selected

    def repeat(self, times: int) -> MegalodonState:
        """Each row `times` times, neighbours together, as beams and several samples of one prompt need."""
        return self[torch.arange(self.batch_size).repeat_interleave(times)]

    def reset(self, rows: Tensor) -> MegalodonState:
        """A state in which the rows of a bool mask [B] start afresh and the others go on."""
        rows = torch.as_tensor(rows, dtype=torch.bool).cpu()
        if rows.shape != (self.batch_size,):
            raise ValueError(f"rows has shape {tuple(rows.shape)}: it must be {(self.batch_size,)}")
        if not rows.any():
            return self
        mask = rows.to(self.device)[:, None, None]
        layers = [layer._replace(cema=layer.cema.masked_fill(mask, 0)) for layer in self.layers]
        return MegalodonState(layers, self.final, self.position.masked_fill(rows, 0), self.dimensions)

    @staticmethod
    def concatenate(states: Sequence[MegalodonState]) -> MegalodonState:
        """One batch of the rows of several, in order.

        Raises:
            ValueError: there is none, or they belong to different models.
        """
        if not states:
            raise ValueError("states is empty: there is nothing to concatenate")
        for state in states[1:]:
            state.dimensions.check(states[0].dimensions)

        def join(*tensors: Tensor) -> Tensor:
            return torch.cat(tensors)

        def join_chunks(chunks: Sequence[OpenChunk]) -> OpenChunk:
            width = max(chunk.keys.shape[1] for chunk in chunks)
            wide = [chunk._grown(c := chunk.keys.shape[1], max(width, c), chunk.keys, chunk.values) for chunk in chunks]
            return OpenChunk(join(*(chunk.keys for chunk in wide)), join(*(chunk.values for chunk in wide)))

        layers = [
            LayerState(
                Moments(*map(join, *(layer.moments for layer in column))),
                join(*(layer.cema for layer in column)),
                join_chunks([layer.chunk for layer in column]),
            )
            for column in zip(*(state.layers for state in states), strict=True)
        ]
        final = Moments(*map(join, *(state.final for state in states)))
        return MegalodonState(layers, final, join(*(state.position for state in states)), states[0].dimensions)

    # --- to and from disk -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name; h as (re, im) in the last dimension; only the filled part of the open chunk."""
        filled = int(self.open_tokens.max()) if self.batch_size else 0
        tensors = {"position": self.position, "final_norm.mean": self.final.mean, "final_norm.var": self.final.var}
        for i, layer in enumerate(self.layers):
            tensors[f"layers.{i}.norm.mean"], tensors[f"layers.{i}.norm.var"] = layer.moments
            tensors[f"layers.{i}.cema"] = torch.view_as_real(layer.cema)
            tensors[f"layers.{i}.keys"] = layer.chunk.keys[:, :filled]
            tensors[f"layers.{i}.values"] = layer.chunk.values[:, :filled]
        return tensors

    @staticmethod
    def from_state_dict(tensors: Mapping[str, Tensor], config: MegalodonConfig | Dimensions) -> MegalodonState:
        """The state of `state_dict`, for a model of this config.

        Raises:
            ValueError: a tensor is missing or has another model's shape; the message names it.
        """
        sizes = config if isinstance(config, Dimensions) else Dimensions.of(config)
        expected = _shapes(sizes)
        missing = sorted(expected.keys() - tensors.keys())
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing[:3])}: it is damaged or of another model")
        batch = len(tensors["position"])
        for name, shape in expected.items():
            actual = tuple(tensors[name].shape)
            wanted = tuple(batch if s is None else actual[i] if s < 0 else s for i, s in enumerate(shape))
            if actual != wanted:
                raise ValueError(f"the state's {name} has shape {actual}: a state of this model has {wanted}")
        layers = [
            LayerState(
                Moments(tensors[f"layers.{i}.norm.mean"], tensors[f"layers.{i}.norm.var"]),
                torch.view_as_complex(tensors[f"layers.{i}.cema"].contiguous()),
                OpenChunk(tensors[f"layers.{i}.keys"].clone(), tensors[f"layers.{i}.values"].clone()),
            )
            for i in range(sizes.num_layers)
        ]
        final = Moments(tensors["final_norm.mean"], tensors["final_norm.var"])
        return MegalodonState(layers, final, tensors["position"].cpu(), sizes)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, under a temporary name and then renamed; `metadata` is kept beside the sizes."""
        path = Path(path)
        header = {**(metadata or {}), "format": FORMAT, "dimensions": json.dumps(vars(self.dimensions))}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, header)
            with Path(temporary).open("rb") as file:
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str], config: MegalodonConfig | None = None) -> MegalodonState:
        """Read a saved state; with `config`, refuse another model's.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is no state, or is the state of another model.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} is no saved state: its format is {header.get('format')!r}, not {FORMAT!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        sizes = Dimensions(**json.loads(header["dimensions"]))
        if config is not None:
            sizes.check(Dimensions.of(config))
        return MegalodonState.from_state_dict(tensors, sizes)

    # --- what Transformers' generation asks of a cache ------------------------------------------------------------

    @property
    def is_linear(self) -> list[bool]:
        """Which layers cannot tell how much they have read, as Transformers asks since 5.24: none."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the row that has read most."""
        return int(self.position.max()) if self.batch_size else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those at `beam_idx`, in place, as beam search needs."""
        self.__dict__.update(vars(self[beam_idx.cpu()]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`repeat` in place."""
        self.__dict__.update(vars(self.repeat(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in place."""
        self.__dict__.update(vars(self[indices.cpu()]))


def _shapes(sizes: Dimensions) -> dict[str, tuple[Any, ...]]:
    """The shape of each tensor of `state_dict`; None stands for the batch, -1 for any length."""
    moments = (None, sizes.norm_num_groups)
    shapes: dict[str, tuple[Any, ...]] = {"position": (None,), "final_norm.mean": moments, "final_norm.var": moments}
    for i in range(sizes.num_layers):
        shapes[f"layers.{i}.norm.mean"] = shapes[f"layers.{i}.norm.var"] = moments
        shapes[f"layers.{i}.cema"] = (None, sizes.model_dim, sizes.cema_ndim, 2)
        shapes[f"layers.{i}.keys"] = (None, -1, sizes.num_heads, sizes.head_dim)
        shapes[f"layers.{i}.values"] = (None, -1, sizes.num_heads, sizes.value_head_dim)
    return shapes
