"""Gecko's state: its size does not depend on how much was read (GECKO: State)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megalodon.models.layers.memory_block import LayerState
from megalodon.models.layers.timestep_decay_norm import DecayedMoments
from megalodon.models.layers.window import Window
from megalodon.models.state import Dimensions, State


@dataclass(frozen=True)
class GeckoDimensions(Dimensions):
    """The sizes that a state and its model must share."""

    model_dim: int
    cema_ndim: int
    norm_num_groups: int
    norm_beta1: float
    norm_beta2: float
    num_heads: int
    head_dim: int
    value_head_dim: int
    chunk_size: int
    rope_base: float
    num_rope_heads: int | None
    multi_segments: bool


class GeckoState(State):
    """The memory of a batch of sequences: constant, from one chunk of keys and values on to two.

    Attributes:
        layers: one `LayerState` a layer, its attention's memory a `Window`.
        final: the final norm's moments.
        position: int64 [B], on the CPU; tokens of its current document that each row has read.
        dimensions: the sizes of the model it belongs to.
    """

    model_type = "gecko"
    dimensions_class = GeckoDimensions
    cut_dimensions = MappingProxyType(
        {"mean": 1, "var": 1, "cema": 1, "keys": 2, "values": 2, "memory": 1, "log_mass": 1}
    )
    compressible = frozenset({"keys", "values", "memory"})
    wide = frozenset({"memory"})
    layers: tuple[LayerState, ...]
    final: DecayedMoments
    dimensions: GeckoDimensions

    def __init__(self, layers: Sequence[LayerState], final: Any, position: Tensor, dimensions: GeckoDimensions) -> None:
        super().__init__([layer.resolved() for layer in layers], final, position, dimensions)

    @property
    def device(self) -> torch.device:
        return self.layers[0].cema.device

    @property
    def bos_places(self) -> tuple[Tensor, Tensor]:
        window: Window = self.layers[0].chunk
        return window.bos_before, window.bos_open

    @property
    def parts(self) -> tuple[str, ...]:
        """average: CEMA's h. statistics: the norms' moments. working_memory: that of chunks long read.
        attention: it and the chunks."""
        return ("average", "statistics", "working_memory", "attention")

    def _forget(self, part: str) -> GeckoState:
        everything = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        start = self._begun_again() if part == "attention" else self
        layers, final = [], self.final.reset(everything) if part == "statistics" else self.final
        for layer in self.layers:
            window: Window = layer.chunk
            fresh = layer.reset(everything)
            if part == "average":
                layers.append(layer._replace(cema=fresh.cema))
            elif part == "statistics":
                layers.append(layer._replace(moments=fresh.moments))
            elif part == "attention":
                layers.append(layer._replace(chunk=fresh.chunk))
            else:
                memory, mass = fresh.chunk.memory, fresh.chunk.log_mass
                layers.append(layer._replace(chunk=window._replace(memory=memory, log_mass=mass)))
        return GeckoState(layers, final, start.position, self.dimensions)

    @classmethod
    def shapes(cls, sizes: GeckoDimensions) -> dict[str, tuple[int | None, ...]]:
        heads, dim, width = sizes.num_heads, sizes.head_dim, sizes.value_head_dim
        moments: dict[str, tuple[int | None, ...]] = {
            "count": (None,),
            "mean": (None, sizes.norm_num_groups),
            "var": (None, sizes.norm_num_groups),
        }
        layer: dict[str, tuple[int | None, ...]] = {
            **{f"norm.{name}": shape for name, shape in moments.items()},
            "cema": (None, sizes.model_dim, sizes.cema_ndim, 2),
            "memory": (None, heads, dim, width),
            "log_mass": (None, heads, dim),
            "bos_before": (None,),
            "bos_open": (None,),
        }
        for part in ("", "before."):
            layer[f"{part}keys"] = (None, -1, heads, 2 * dim)
            layer[f"{part}values"] = (None, -1, heads, width)
        shapes: dict[str, tuple[int | None, ...]] = {"position": (None,)}
        shapes |= {f"final_norm.{name}": shape for name, shape in moments.items()}
        for i in range(sizes.num_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    @classmethod
    def places(cls, sizes: GeckoDimensions, name: str, position: int) -> int:
        if ".before." in name:
            return sizes.chunk_size if position >= sizes.chunk_size else 0
        return super().places(sizes, name, position)

    @classmethod
    def tensor_dtype(cls, name: str, activations: torch.dtype, statistics: torch.dtype) -> torch.dtype:
        kind = name.rsplit(".", 1)[-1]
        if kind.startswith("bos_"):
            return torch.int64
        if kind in ("memory", "log_mass"):
            return torch.promote_types(activations, torch.float32)
        return super().tensor_dtype(name, activations, statistics)

    @classmethod
    def nothing(cls, name: str) -> float:
        kind = name.rsplit(".", 1)[-1]
        return -math.inf if kind == "log_mass" else -1 if kind.startswith("bos_") else 0

    @classmethod
    def layer_bytes(cls, sizes: Any, open_tokens: int = 0, activations: torch.dtype = torch.float32) -> int:
        keys_and_values = sizes.num_heads * (2 * sizes.head_dim + sizes.value_head_dim) * activations.itemsize
        # the base counts the chunk before as it counts the open one, which it is not: it is whole
        return super().layer_bytes(sizes, 0, activations) + (sizes.chunk_size + open_tokens) * keys_and_values

    @classmethod
    def layer_from(cls, tensors: Mapping[str, Tensor], sizes: Any, layer: int) -> LayerState:
        return LayerState.from_tensors(tensors, DecayedMoments, Window)

    @classmethod
    def final_from(cls, tensors: Mapping[str, Tensor], sizes: Any) -> DecayedMoments:
        return DecayedMoments.from_tensors(tensors)
