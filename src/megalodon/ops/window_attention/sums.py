"""What softmax attention sums up before it divides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class WindowSums(NamedTuple):
    """Softmax attention in parts, in float32 or better.

    Attributes:
        values: [B, L, H, e]; `sum_j exp(s_j - m) v_j`.
        weights: [B, L, H]; `sum_j exp(s_j - m)`.
        highest: [B, L, H]; m, the highest score.
    """

    values: Tensor
    weights: Tensor
    highest: Tensor
