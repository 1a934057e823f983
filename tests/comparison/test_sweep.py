"""The sweep goes on until the best rate has a worse one on both sides."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.comparison import choose_rate

GRID = [1e-3, 2e-3, 4e-3]


def finish(loss, widen: int = 6, grid: list[float] = GRID) -> tuple[float, list[float]]:
    """The rate that is chosen, and those that had to be tried, in the order in which they were asked for."""
    known: dict[float, float] = {}
    while True:
        choice = choose_rate(grid, widen, known.get, "llama")
        if choice.best is not None:
            return choice.best, list(choice.rates)
        missing = [rate for rate in choice.rates if rate not in known]
        assert missing
        known |= {rate: loss(rate) for rate in missing}


@given(peak=st.floats(-11.0, -2.0))
def test_the_best_is_inside(peak: float) -> None:
    best, rates = finish(lambda rate: (math.log(rate) - peak) ** 2, widen=20)
    place = rates.index(best)
    assert rates == sorted(rates) and 0 < place < len(rates) - 1
    assert min(rates, key=lambda rate: (math.log(rate) - peak) ** 2) == best
    assert len(rates) <= 3 + abs(peak - math.log(2e-3)) / math.log(2) + 2


def test_the_grid_goes_on_by_its_own_ratio() -> None:
    assert finish(lambda rate: -rate if rate < 0.03 else math.inf) == (0.016, [*GRID, 8e-3, 0.016, 0.032])
    assert finish(lambda rate: abs(rate - 5e-4)) == (5e-4, [2.5e-4, 5e-4, *GRID])


def test_where_all_diverge_it_goes_down() -> None:
    assert finish(lambda rate: math.inf if rate > 3e-4 else abs(rate - 2.5e-4))[0] == 2.5e-4


def test_a_flat_loss_takes_the_lower_rate_and_ends() -> None:
    with pytest.raises(ValueError, match=r"llama's best learning rate, 0\.0005, is the lowest of 4.*widen \(1\)"):
        finish(lambda rate: 1.0, widen=1)


def test_an_edge_that_may_not_move_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.016, is the highest of 5 and sweep\.widen \(2\)"):
        finish(lambda rate: -rate, widen=2)


def test_a_missing_loss_decides_nothing() -> None:
    assert choose_rate(GRID, 6, {1e-3: 3.0, 2e-3: 1.0}.get) == choose_rate(GRID, 6, {}.get)
