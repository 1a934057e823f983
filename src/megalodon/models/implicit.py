"""The implicit attention of a layer (arXiv 2405.16504): the matrix that turns values into outputs.

A layer's mixer is written as a sum of paths. On a path, with all but the values held at what the text made of it,
outputs are a matrix times values: `outputs = sum of gate * (matrix @ values) + constant`. The mixer's result is the sum
of the paths' outputs after their last linear map. Nothing is left out: skips are in the matrix, biases in `constant`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Path:
    """One way from values to outputs, H heads of e channels each.

    Attributes:
        name: such as "attention" or "memory".
        values: [B, L, H, e].
        terms: (matrix [B, H, L, L], gate [B, L, H, e] or None for ones); matrices have the outputs' place first.
        constant: [B, L, H, e], what outputs are without values; None for nothing.
        outputs: [B, L, H, e] as the layer itself computed them, to check against.
        weight: [D, H * e], the linear map after the outputs.
        bias: [D] or None, added after it.
    """

    name: str
    values: Tensor
    terms: tuple[tuple[Tensor, Tensor | None], ...]
    outputs: Tensor
    weight: Tensor
    constant: Tensor | None = None
    bias: Tensor | None = None

    def applied(self) -> Tensor:
        """The matrix times the values, and the constant: [B, L, H, e]. Equal to `outputs` but for rounding."""
        total = torch.zeros_like(self.outputs) if self.constant is None else self.constant
        for matrix, gate in self.terms:
            mixed = torch.einsum("bhts,bshe->bthe", matrix, self.values.to(matrix.dtype))
            total = total + (mixed if gate is None else gate * mixed)
        return total

    def matrix(self) -> Tensor:
        """[B, H * e, L, L]: the whole matrix of each channel, gates included."""
        total: Tensor | None = None
        channels = self.values.shape[-1]
        for matrix, gate in self.terms:
            each = matrix[:, :, None].expand(-1, -1, channels, -1, -1)
            each = each if gate is None else each * gate.permute(0, 2, 3, 1)[..., None]
            total = each if total is None else total + each
        assert total is not None
        return total.flatten(1, 2)

    def mean_map(self, gradient: Tensor | None = None) -> Tensor:
        """[B, L, L]: the mean over channels of the matrix' positive part, as published.

        Args:
            gradient: [B, L, H, e], of a number with respect to `outputs`. Each entry is then taken times the number's
                derivative with respect to it, which is its output's gradient times its value.
        """
        first = self.terms[0][0]
        total = first.new_zeros(first.shape[0], *first.shape[2:])
        heads, channels = self.values.shape[2:]
        for head in range(heads):  # all channels of all heads at once would not fit
            for channel in range(channels):
                one = torch.zeros_like(total)
                for matrix, gate in self.terms:
                    one += matrix[:, head] if gate is None else matrix[:, head] * gate[:, :, head, channel, None]
                if gradient is not None:
                    one = one * gradient[:, :, head, channel, None] * self.values[:, None, :, head, channel]
                total += one.clamp(min=0)
        return total / (heads * channels)

    def result(self) -> Tensor:
        """What the path adds to the mixer's result: [B, L, D]."""
        return F.linear(self.outputs.flatten(-2), self.weight, self.bias)


def probe(values: Tensor) -> Tensor:
    """Values [B, L, H, e] in whose place the L unit vectors stand, [B, L, H, L]: an operator that is linear in its
    values makes its matrix of them, as [B, L, H, L]."""
    batch, length, heads = values.shape[:3]
    return torch.eye(length, dtype=values.dtype, device=values.device)[None, :, None].expand(batch, -1, heads, -1)


def of_probe(made: Tensor) -> Tensor:
    """[B, L, H, L] of an operator given `probe` -> [B, H, L, L], the outputs' place first."""
    return made.transpose(1, 2)


def banded(kernel: Tensor, length: int) -> Tensor:
    """[C, L, L]: the causal convolution with a kernel [C, K] whose last tap falls on the token itself."""
    taps = kernel.shape[1]
    steps = torch.arange(length, device=kernel.device)
    back = steps[:, None] - steps[None]
    inside = (back >= 0) & (back < taps)
    return torch.where(inside, kernel[:, (taps - 1 - back).clamp(0, taps - 1)], 0)
