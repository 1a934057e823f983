"""TimestepNorm: group norm whose statistics accumulate along time (SPEC: TimestepNorm)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon import ops
from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.layout import Layout


class Moments(NamedTuple):
    """Mean and variance of what a sequence has shown so far, [B, G] each. The count is the sequence's position."""

    mean: Tensor
    var: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Moments:
        """Moments with copies of what `function` makes of each."""
        return Moments(function(self.mean).clone(), function(self.var).clone())

    def detach(self) -> Moments:
        """The same moments without their history."""
        return Moments(self.mean.detach(), self.var.detach())

    def cast(self, dtype: torch.dtype) -> Moments:
        """As they are: statistics keep their precision."""
        return self

    def reset(self, rows: Tensor) -> Moments:
        """As they are: those of a row that has read nothing are not looked at."""
        return self

    @staticmethod
    def concatenate(moments: Sequence[Moments]) -> Moments:
        """One batch of the rows of several, in order."""
        return Moments(torch.cat([each.mean for each in moments]), torch.cat([each.var for each in moments]))

    def fitted(self, position: Tensor, sizes: Any) -> Moments:
        """As they are: there is no room in them."""
        return self

    def tensors(self, position: Tensor, sizes: Any) -> dict[str, Tensor]:
        """What is kept on disk, by name."""
        return self._asdict()

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Moments:
        """The inverse of `tensors`."""
        return Moments(tensors["mean"], tensors["var"])


class TimestepNorm(nn.Module):
    """Parameters: `weight` (offset) and `bias` [D]; with a positive `prior_count` also `prior_mean`, `prior_logv`
    [G].
    """

    def __init__(self, dim: int, num_groups: int, prior_count: int, eps: float) -> None:
        super().__init__()
        self.num_groups, self.prior_count, self.eps = num_groups, prior_count, eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        if prior_count > 0:
            self.prior_mean = nn.Parameter(torch.zeros(num_groups))
            self.prior_logv = nn.Parameter(torch.zeros(num_groups))

    def initialize(self) -> None:
        """SPEC: Initialisation."""
        for parameter in self.parameters(recurse=False):
            init.zeros_(parameter)

    def prior(self, device: torch.device) -> ops.Prior:
        """What a fresh document starts from."""
        dtype = accumulator_dtype(device)
        if self.prior_count == 0:
            return ops.Prior.default(self.num_groups, dtype, device)
        return ops.Prior(self.prior_count, self.prior_mean.to(dtype), self.prior_logv.to(dtype).exp())

    def forward(self, x: Tensor, moments: Moments | None, layout: Layout) -> tuple[Tensor, Moments]:
        """x [B, L, D] and the moments of what came before -> (the normalised x, the moments after it)."""
        count = mean = var = prior = None
        trained = self.prior_count > 0 and torch.is_grad_enabled()
        if moments is None or layout.fresh_rows is not None or layout.restart is not None or trained:
            prior = self.prior(x.device)
        if moments is not None:
            count = layout.seen + self.prior_count if self.prior_count else layout.seen
            mean, var = moments
            if layout.fresh_rows is not None:
                assert prior is not None
                mean = torch.where(layout.fresh_rows[:, None], prior.mean, mean)
                var = torch.where(layout.fresh_rows[:, None], prior.var, var)
            elif trained:
                assert prior is not None
                # Parameters have a gradient, if only of zeros, whatever a batch holds: so sharded ranks stay in step.
                mean, var = mean + 0 * prior.mean, var + 0 * prior.var
        y, _, mean, var = ops.timestep_norm(
            x, self.weight, self.bias, self.num_groups, count, mean, var, eps=self.eps, prior=prior, layout=layout
        )
        return y, Moments(mean, var)
