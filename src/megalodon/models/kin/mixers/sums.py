"""What linear attention remembers, as memories: sums of constant size, with or without weights and a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from megalodon.models.kin.mixers.base import Memory
from megalodon.ops import LinearState, RecentKeys
from megalodon.ops.backend import full_precision


def sums_of(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros in the precision that sums are kept in."""
    return torch.zeros(shape, device=device, dtype=full_precision(dtype) if dtype.is_floating_point else dtype)


@dataclass(frozen=True)
class Sums(Memory):
    """sums: [B, G, f, e]."""

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType({"state": frozenset({"sums"})})

    sums: Tensor

    def state(self) -> LinearState:
        """As `ops.linear_attention` takes it."""
        return LinearState(self.sums)


@dataclass(frozen=True)
class WeightedSums(Memory):
    """sums: [B, G, f, e]; weights: [B, G, f], what normalises them."""

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType({"state": frozenset({"sums", "weights"})})

    sums: Tensor
    weights: Tensor

    @staticmethod
    def empty(batch: int, heads: int, features: int, values: int, device, dtype) -> WeightedSums:
        """Of nothing read."""
        return WeightedSums(
            sums_of((batch, heads, features, values), device, dtype), sums_of((batch, heads, features), device, dtype)
        )

    def state(self) -> LinearState:
        """As `ops.linear_attention` takes it."""
        return LinearState(self.sums, self.weights)

    @staticmethod
    def of(state: LinearState) -> WeightedSums:
        """From what `ops.linear_attention` returns."""
        assert state.weights is not None
        return WeightedSums(state.sums, state.weights)


@dataclass(frozen=True)
class WindowedSums(Memory):
    """`WeightedSums`, and keys [B, n, G, d] and values [B, n, G, e] of the last n tokens, right-aligned."""

    sums: Tensor
    weights: Tensor
    keys: Tensor
    values: Tensor

    def state(self) -> LinearState:
        """As `ops.linear_attention` takes it."""
        return LinearState(self.sums, self.weights, RecentKeys(self.keys, self.values))

    @staticmethod
    def of(state: LinearState) -> WindowedSums:
        """From what `ops.linear_attention` returns."""
        assert state.weights is not None and state.recent is not None
        return WindowedSums(state.sums, state.weights, *state.recent)


@dataclass(frozen=True)
class WindowMemory(Memory):
    """Keys [B, n, G, d] and values [B, n, G, e] of the last n tokens, right-aligned, in the dtype of activations."""

    keys: Tensor
    values: Tensor
