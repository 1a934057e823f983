"""What the sequences of a batch remember in a MEGABYTE model: the patches read, and the bytes of the open one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megalodon.models.kin.mixers.base import Memory
from megalodon.models.megabyte.config import MegabyteConfig
from megalodon.models.megabyte.stage import LayerMemory
from megalodon.models.state import Dimensions, State


@dataclass(frozen=True)
class OpenPatch(Memory):
    """embeddings: [B, S, .], of the bytes of the open patch, in every stage's table, zeros after them; context: [B, D],
    what the coarsest stage says of the patches before it."""

    embeddings: Tensor
    context: Tensor

    @staticmethod
    def empty(sizes: MegabyteDimensions, batch: int, device: torch.device, dtype: torch.dtype) -> OpenPatch:
        """Of rows that have read nothing."""
        width = sizes.model_dim * (1 + len(sizes.coarse_dims))
        return OpenPatch(
            torch.zeros(batch, sizes.patch_bytes, width, device=device, dtype=dtype),
            torch.zeros(batch, sizes.coarse_dims[0], device=device, dtype=dtype),
        )


@dataclass(frozen=True)
class MegabyteDimensions(Dimensions):
    """The sizes that a state and its model must share."""

    model_dim: int
    coarse_dims: list[int]
    patch_sizes: list[int]
    num_heads: int
    head_dim: int
    rope_base: float | None

    @property
    def patch_bytes(self) -> int:
        """Bytes of a whole patch."""
        return int(torch.tensor(self.patch_sizes).prod())

    def layer(self, batch: int, device: torch.device, dtype: torch.dtype) -> LayerMemory:
        """The memory of a layer of the coarsest stage, of rows that have read nothing."""
        return LayerMemory.empty(batch, self.coarse_dims[0], self.num_heads, self.head_dim, device, dtype)


class MegabyteState(State):
    """The memory of a batch of sequences.

    Attributes:
        layers: a `LayerMemory` for each layer of the coarsest stage, over its start and the patches read.
        final: the `OpenPatch`.
        position: int64 [B], on the CPU; bytes of its current document that each row has read.
        dimensions: the sizes of the model it belongs to.
    """

    model_type = "megalodon-megabyte"
    dimensions_class = MegabyteDimensions
    dimensions: MegabyteDimensions

    @classmethod
    def empty(cls, config: MegabyteConfig, batch: int, device: torch.device, dtype: torch.dtype) -> Self:
        """Of rows that have read nothing."""
        sizes = MegabyteDimensions.of(config)
        layers = [sizes.layer(batch, device, dtype) for _ in range(sizes.num_layers)]
        final = OpenPatch.empty(sizes, batch, device, dtype)
        return cls(layers, final, torch.zeros(batch, dtype=torch.int64), sizes)

    @classmethod
    def shapes(cls, sizes: MegabyteDimensions) -> dict[str, tuple[int | None, ...]]:
        shapes: dict[str, tuple[int | None, ...]] = {"position": (None,)}
        meta = torch.device("meta")
        shapes |= OpenPatch.empty(sizes, 0, meta, torch.float32).shapes("final_norm.")
        for i in range(sizes.num_layers):
            shapes |= sizes.layer(0, meta, torch.float32).shapes(f"layers.{i}.")
        return shapes

    @classmethod
    def places(cls, sizes: MegabyteDimensions, name: str, position: int) -> int:
        return position // sizes.patch_bytes + 1 if position else 0

    @classmethod
    def tensor_dtype(cls, name: str, activations: torch.dtype, statistics: torch.dtype) -> torch.dtype:
        return torch.int64 if name == "position" else activations

    @classmethod
    def layer_from(cls, tensors: Mapping[str, Tensor], sizes: MegabyteDimensions, layer: int) -> LayerMemory:
        return sizes.layer(0, torch.device("meta"), torch.float32).with_tensors(tensors)

    @classmethod
    def final_from(cls, tensors: Mapping[str, Tensor], sizes: Any) -> OpenPatch:
        return OpenPatch.empty(sizes, 0, torch.device("meta"), torch.float32).with_tensors(tensors)
