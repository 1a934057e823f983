"""Micro-batches add up on each rank; gradients travel once a step, however many there are."""

from __future__ import annotations

from collections import Counter

import pytest
from communication import Communication
from parallel_cases import Case, build, own_parts
from test_meshes import name

from megalodon.parallel import MeshSizes

REDUCTIONS = ("reduce_scatter", "all_reduce")
DEEP = (("num_layers", 4),)


def calls_of_a_step(sizes: MeshSizes, case: Case) -> Counter:
    mesh, model = build(sizes, case)
    batch = next(iter(case.batches()))
    with Communication() as seen:
        model.accumulate_gradients(own_parts(mesh, case, batch, [None] * case.parts), 1.0)
    return seen.calls


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes", [MeshSizes(replicate=2), MeshSizes(shard=2), MeshSizes(replicate=2, shard=2)], ids=name
)
def test_gradients_travel_once(ranks, sizes, precision):
    one, four = (
        ranks.run(sizes.world_size, calls_of_a_step, sizes, Case(batch=16, parts=parts, precision=precision))
        for parts in (1, 4)
    )
    for before, after in zip(one, four, strict=True):
        reductions = [{key: n for key, n in calls.items() if key[0] in REDUCTIONS} for calls in (before, after)]
        # A reduction for each block (with bfloat16 its matrices apart) and one for embedding, final norm and head.
        groups = 1 + 2 * (2 if precision == "bfloat16" else 1)
        kinds = {"reduce_scatter": sizes.shard, "all_reduce": sizes.replicate}
        assert reductions[0] == {(kind, size): groups for kind, size in kinds.items() if size > 1}
        assert reductions[0] == reductions[1]


def test_gradients_of_a_pipeline_travel_once(ranks):
    sizes = MeshSizes(pipeline=2, shard=2)
    for calls in ranks.run(4, calls_of_a_step, sizes, Case(batch=16, parts=4, changes=DEEP)):
        assert calls["reduce_scatter", 2] == 1 + 2  # of two blocks, and of what stands before or after them
