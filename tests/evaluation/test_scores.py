"""Scores by position: every prediction lands in one bucket, the right one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon.evaluation import Positions, Score, bucket_index, bucket_range


@given(st.integers(0, 10**12))
def test_a_position_lies_in_the_range_of_its_bucket(position: int) -> None:
    first, stop = bucket_range(bucket_index(position))
    assert first <= position < stop


def test_buckets_double() -> None:
    assert [bucket_range(i) for i in range(4)] == [(0, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=5))
def test_pieces_add_up_to_the_whole(lengths: list[int]) -> None:
    total = sum(lengths)
    losses = np.random.default_rng(0).random(total)
    sizes = np.arange(total) % 5
    scores, first = Positions(), 1
    for length in lengths:
        scores.add_losses(first, losses[first - 1 : first - 1 + length], sizes[first - 1 : first - 1 + length])
        first += length
    for index, bucket in enumerate(scores.buckets):
        start, stop = bucket_range(index)
        inside = slice(max(start, 1) - 1, stop - 1)
        assert bucket.tokens == len(losses[inside]) and bucket.bytes == sizes[inside].sum()
        assert bucket.nats == pytest.approx(losses[inside].sum())
    assert scores.total.tokens == total and scores.total.nats == pytest.approx(losses.sum())


def test_report_of_known_numbers() -> None:
    report = Score(tokens=4, nats=8 * math.log(2), bytes=16).report()
    assert report == {
        "tokens": 4,
        "bytes": 16,
        "loss": pytest.approx(2 * math.log(2)),
        "perplexity": pytest.approx(4.0),
        "bits_per_byte": pytest.approx(0.5),
    }
    assert Score().report()["loss"] is None
    mixed = Score(1, 1.0, 3)
    mixed.add(Score(1, 1.0, None))
    assert mixed.report()["bits_per_byte"] is None
