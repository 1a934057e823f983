"""The learning rate of an architecture: the best of a grid that is widened until the best is not at its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What a sweep has come to: the `rates` wanted so far, ascending, and the `best`; None while a loss is missing."""

    rates: tuple[float, ...]
    best: float | None = None


def choose_rate(grid: Sequence[float], widen: int, loss: Callable[[float], float | None], name: str = "") -> Choice:
    """The rate of the least held-out loss, or the rates that must be tried to find it.

    The grid goes on by its own ratio on the side where the best is at the edge; of equal losses the lower rate wins.

    Args:
        grid: ascending. widen: how many rates may be added on a side.
        loss: of a rate; infinite where training diverged, None where it is not known yet.
        name: of the architecture, for the error.

    Raises:
        ValueError: the best is still at the edge when `widen` rates were added there.
    """
    rates = list(grid)
    while True:
        known = [loss(rate) for rate in rates]
        if any(value is None for value in known):
            return Choice(tuple(rates))
        losses = [value for value in known if value is not None]
        best = min(range(len(rates)), key=lambda i: losses[i])
        if math.isinf(losses[best]):
            best = 0  # all diverged: lower
        if 0 < best < len(rates) - 1:
            return Choice(tuple(rates), rates[best])
        edge, added = (
            ("lowest", rates[0] * rates[0] / rates[1]) if best == 0 else ("highest", rates[-1] ** 2 / rates[-2])
        )
        outside = sum(rate < grid[0] for rate in rates) if best == 0 else sum(rate > grid[-1] for rate in rates)
        if outside >= widen:
            raise ValueError(
                f"sweep: {name}'s best learning rate, {rates[best]:g}, is the {edge} of {len(rates)} and sweep.widen "
                f"({widen}) allows no more there: give other sweep.learning_rates"
            )
        rates = sorted([*rates, float(f"{added:.4g}")])
