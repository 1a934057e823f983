"""How the heads of a model turn: by powers of a base, or by frequencies that another model was trained with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class Rotary:
    """Of heads of `size` numbers: pair i turns by base^(-2i / size) radians a token, or by `frequencies[i]`; then
    turned numbers are `amplitude` times as large, and pairs without a frequency are left as they are."""

    size: int
    base: float
    frequencies: tuple[float, ...] | None = None
    amplitude: float = 1.0

    @staticmethod
    def of(config: KinConfig) -> Rotary | None:
        """That of a model; None where nothing turns."""
        if config.rope_frequencies is not None:
            return Rotary(config.head_size, 0.0, tuple(config.rope_frequencies), float(config.rope_amplitude))
        return None if config.rope_base is None else Rotary(config.head_size, float(config.rope_base))

    def turn(self, layout: Layout, *heads: Tensor) -> list[Tensor]:
        """Heads [B, L, H, d] turned by the places of their tokens, on halves."""
        if self.frequencies is None:
            turns = ops.rotations_of(layout, self.size, self.base)
        else:
            turns = ops.turns_of(layout, self.frequencies, self.amplitude)
        return [ops.rotate_halves(x, turns) for x in heads]
