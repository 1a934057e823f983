"""Megalodon's state: its size does not depend on how much was read (SPEC: State)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from megalodon.models.layers.memory_block import LayerState
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_norm import Moments
from megalodon.models.megalodon.held import Held
from megalodon.models.state import Dimensions, State


@dataclass(frozen=True)
class MegalodonDimensions(Dimensions):
    """The sizes that a state and its model must share."""

    model_dim: int
    cema_ndim: int
    norm_num_groups: int
    num_heads: int
    head_dim: int
    value_head_dim: int
    chunk_size: int
    rope_base: float
    norm_prior_count: int


class MegalodonState(State):
    """The memory of a batch of sequences; at most a constant, least when no chunk is open.

    Attributes:
        layers: one `LayerState` a layer, its attention's memory an `OpenChunk`.
        final: the final norm's moments.
        position: int64 [B], on the CPU; tokens of its current document that each row has read.
        dimensions: the sizes of the model it belongs to.
    """

    model_type = "megalodon"
    dimensions_class = MegalodonDimensions
    cut_dimensions = MappingProxyType({"mean": 1, "var": 1, "cema": 1, "keys": 2, "values": 2})
    layers: tuple[LayerState, ...]
    final: Moments
    dimensions: MegalodonDimensions
    _held: Held | None = None

    def __init__(
        self, layers: Sequence[LayerState], final: Any, position: Tensor, dimensions: MegalodonDimensions
    ) -> None:
        super().__init__([layer.resolved() for layer in layers], final, position, dimensions)

    @classmethod
    def of_held(cls, held: Held, position: Tensor, dimensions: MegalodonDimensions) -> Self:
        """The state that a fused step leaves, whose layers are made when somebody asks for them."""
        state = cls.__new__(cls)
        state._held, state.position, state.dimensions = held, position, dimensions
        return state

    @property
    def held(self) -> Held | None:
        """What a fused step has left, while nobody has asked for layers."""
        return None if "layers" in self.__dict__ else self._held

    def __getattr__(self, name: str) -> Any:
        if name in ("layers", "final"):
            held = self.__dict__.get("_held")
            if held is not None and "layers" not in self.__dict__:
                final, layers = held.final, held.layers()
                self.__dict__ |= {"final": final, "layers": layers}
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "final": self.final, "position": self.position, "dimensions": self.dimensions}

    @property
    def device(self) -> torch.device:
        return self.layers[0].cema.device if self.held is None else self.held.h.device

    @property
    def parts(self) -> tuple[str, ...]:
        """average: CEMA's h. statistics: the norms' moments. An open chunk is empty wherever they can be forgotten."""
        return ("average", "statistics")

    def _forget(self, part: str) -> MegalodonState:
        if part == "statistics":
            return self._begun_again()
        layers = [layer._replace(cema=torch.zeros_like(layer.cema)) for layer in self.layers]
        return MegalodonState(layers, self.final, self.position, self.dimensions)

    @classmethod
    def shapes(cls, sizes: MegalodonDimensions) -> dict[str, tuple[int | None, ...]]:
        moments = (None, sizes.norm_num_groups)
        shapes: dict[str, tuple[int | None, ...]] = {
            "position": (None,),
            "final_norm.mean": moments,
            "final_norm.var": moments,
        }
        for i in range(sizes.num_layers):
            shapes[f"layers.{i}.norm.mean"] = shapes[f"layers.{i}.norm.var"] = moments
            shapes[f"layers.{i}.cema"] = (None, sizes.model_dim, sizes.cema_ndim, 2)
            shapes[f"layers.{i}.keys"] = (None, -1, sizes.num_heads, sizes.head_dim)
            shapes[f"layers.{i}.values"] = (None, -1, sizes.num_heads, sizes.value_head_dim)
        return shapes

    @classmethod
    def nothing(cls, name: str) -> float:
        return float(name.endswith(".var"))

    @classmethod
    def layer_from(cls, tensors: Mapping[str, Tensor], sizes: Any, layer: int) -> LayerState:
        return LayerState.from_tensors(tensors, Moments, OpenChunk)

    @classmethod
    def final_from(cls, tensors: Mapping[str, Tensor], sizes: Any) -> Moments:
        return Moments.from_tensors(tensors)
