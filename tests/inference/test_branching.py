"""Which states of a text are worth keeping: near every place where it may be left, and few of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megalodon.inference.branching import MOST_APART, spacing


def kept(end: int, block: int) -> list[int]:
    return [at for at in range(block, end, block) if at % spacing(end - at, block) == 0]


@given(end=st.integers(1, 60_000), block=st.sampled_from([16, 48, 512]), data=st.data())
def test_whoever_changes_a_text_reads_at_most_an_eighth_more(end: int, block: int, data: st.DataObject) -> None:
    change = data.draw(st.integers(0, end - 1))
    before = max([0, *(at for at in kept(end, block) if at <= change)])
    assert change - before <= (end - change) / 8 or change - before < block


@given(end=st.integers(1, 60_000), more=st.integers(0, 60_000), block=st.sampled_from([16, 512]))
def test_a_text_that_grows_only_gives_some_up(end: int, more: int, block: int) -> None:
    assert set(kept(end + more, block)) & set(range(end)) <= set(kept(end, block))


def test_few_are_kept_and_they_are_never_very_far_apart() -> None:
    assert len(kept(100_000, 512)) < 55
    far = kept(4_000_000, 512)
    assert max(np.diff(far)) == MOST_APART and len(far) < 4_000_000 / MOST_APART + 90
    assert spacing(10**9, 3 * MOST_APART) == 3 * MOST_APART, "a block may be larger"
