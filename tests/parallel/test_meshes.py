"""Every mesh trains as one process does: losses, gradients, norms and ten optimiser steps."""

from __future__ import annotations

from functools import cache

import pytest
from parallel_cases import Case, assert_equal_training, train_on_mesh, train_whole

from megalodon.parallel import MeshSizes

TOLERANCE = 1e-5
expected = cache(train_whole)

TWO = [MeshSizes(**{axis: 2}) for axis in ("replicate", "shard", "tensor", "pipeline", "chunk")]


def name(value) -> str | None:
    return str(value).replace(" ", "") if isinstance(value, MeshSizes) else None


def check(ranks, sizes: MeshSizes, case: Case) -> None:
    parts = sizes.pipeline
    on_mesh = Case(**{**vars(case), "parts": parts})
    answers = ranks.run(sizes.world_size, train_on_mesh, sizes, on_mesh)
    assert_equal_training(case, expected(case), answers, TOLERANCE)


@pytest.mark.parametrize("kind", ["plain", "packed", "streamed"])
@pytest.mark.parametrize("sizes", TWO, ids=name)
def test_two_processes(ranks, sizes, kind):
    check(ranks, sizes, Case(kind))
