"""TimestepDecayNorm: group norm whose statistics decay along time (GECKO: TimestepDecayNorm)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon import ops
from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.layout import Layout


class DecayedMoments(NamedTuple):
    """What a sequence has shown of late: count int64 [B] of its segment's tokens, raw averages mean and var [B, G]."""

    count: Tensor  # type: ignore[assignment]  # hides a tuple's method
    mean: Tensor
    var: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> DecayedMoments:
        """Moments with copies of what `function` makes of each."""
        return DecayedMoments(*(function(x).clone() for x in self))

    def detach(self) -> DecayedMoments:
        """The same moments without their history."""
        return DecayedMoments(*(x.detach() for x in self))

    def cast(self, dtype: torch.dtype) -> DecayedMoments:
        """As they are: statistics keep their precision."""
        return self

    def reset(self, rows: Tensor) -> DecayedMoments:
        """Zero where rows begin afresh."""
        return DecayedMoments(
            self.count.masked_fill(rows, 0),
            self.mean.masked_fill(rows[:, None], 0),
            self.var.masked_fill(rows[:, None], 0),
        )

    @staticmethod
    def concatenate(moments: Sequence[DecayedMoments]) -> DecayedMoments:
        """One batch of the rows of several, in order."""
        return DecayedMoments(*(torch.cat(column) for column in zip(*moments, strict=True)))

    def fitted(self, position: Tensor, sizes: Any) -> DecayedMoments:
        """As they are: there is no room in them."""
        return self

    def tensors(self, position: Tensor, sizes: Any) -> dict[str, Tensor]:
        """What is kept on disk, by name."""
        return self._asdict()

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> DecayedMoments:
        """The inverse of `tensors`."""
        return DecayedMoments(tensors["count"], tensors["mean"], tensors["var"])


class TimestepDecayNorm(nn.Module):
    """Parameters: `weight` (offset) and `bias` [D]."""

    def __init__(self, dim: int, num_groups: int, beta1: float, beta2: float, eps: float) -> None:
        super().__init__()
        self.num_groups, self.beta1, self.beta2, self.eps = num_groups, beta1, beta2, eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def initialize(self) -> None:
        """Scale 1, bias 0."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(self, x: Tensor, moments: DecayedMoments | None, layout: Layout) -> tuple[Tensor, DecayedMoments]:
        """x [B, L, D] and the moments of what came before -> (the normalised x, the moments after it)."""
        if moments is None:
            zeros = torch.zeros(len(x), self.num_groups, dtype=accumulator_dtype(x.device), device=x.device)
            moments = DecayedMoments(torch.zeros(len(x), dtype=torch.int64, device=x.device), zeros, zeros)
        y, *after = ops.timestep_decay_norm(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            self.beta1,
            self.beta2,
            *moments,
            bos_mask=None if layout.segments is None else layout.segments.bos,
            eps=self.eps,
            layout=layout,
        )
        return y, DecayedMoments(*after)
