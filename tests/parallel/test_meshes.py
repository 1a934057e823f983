"""Every mesh trains as one process does: losses, gradients, norms and ten optimiser steps."""

from __future__ import annotations

from functools import cache
from itertools import combinations

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


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "packed", "streamed"])
@pytest.mark.parametrize("sizes", TWO, ids=name)
@pytest.mark.parametrize("architecture", ["megalodon", "gecko"])
def test_two_processes(ranks, architecture, sizes, kind):
    check(ranks, sizes, Case(kind, architecture=architecture))


PAIRS = [
    MeshSizes(**{one: 2, other: 2})
    for one, other in combinations(("replicate", "shard", "tensor", "pipeline", "chunk"), 2)
]
FOURS = [MeshSizes(**{axis: 4}) for axis in ("replicate", "shard", "tensor", "pipeline", "chunk")]
DEEP = (("num_layers", 4), ("num_heads", 4), ("chunk_size", 16))
TIED = (("share_emb", True),)


@pytest.mark.parametrize("kind", [pytest.param("packed", marks=pytest.mark.slow), "streamed"])
@pytest.mark.parametrize("sizes", [*PAIRS, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in FOURS)], ids=name)
def test_four_processes(ranks, sizes, kind):
    check(ranks, sizes, Case(kind, changes=DEEP))


@pytest.mark.parametrize(
    "sizes",
    [*(pytest.param(sizes, marks=pytest.mark.slow) for sizes in FOURS[:4]), FOURS[4], MeshSizes(tensor=2, chunk=2)],
    ids=name,
)
def test_four_processes_of_the_successor(ranks, sizes):
    """Two chunks of attention, and the working memory, over spans; heads of which one is not rotated."""
    check(ranks, sizes, Case("streamed", changes=(*DEEP, ("num_rope_heads", 3)), architecture="gecko"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("sizes", PAIRS, ids=name)
def test_pairs_of_the_successor(ranks, sizes, kind):
    changes = (*DEEP, ("layernorm_num_groups", 2), ("two_hop_residual", True))
    check(ranks, sizes, Case(kind, changes=changes, architecture="gecko"))


@pytest.mark.parametrize("sizes", [MeshSizes(tensor=2), MeshSizes(pipeline=2)], ids=name)
def test_segments_are_cut_at_bos_tokens_on_a_mesh_too(ranks, sizes):
    changes = (("multi_segments", True), ("bos_token_id", 3))
    check(ranks, sizes, Case("streamed", changes=changes, epsilon=1e-6, architecture="gecko"))


TRIPLES = [
    MeshSizes(**dict.fromkeys(axes, 2))
    for axes in combinations(("replicate", "shard", "tensor", "pipeline", "chunk"), 3)
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "packed", "streamed"])
@pytest.mark.parametrize("sizes", [*TRIPLES, MeshSizes(chunk=8)], ids=name)
def test_eight_processes(ranks, sizes, kind):
    check(ranks, sizes, Case(kind, changes=DEEP, batch=8, epsilon=1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "packed", "streamed"])
def test_eight_fresh_processes(fresh_ranks, kind):
    """Where earlier jobs' meshes look like this one's, DTensor finds their groups, which are gone."""
    check(fresh_ranks, MeshSizes(chunk=4, pipeline=2), Case(kind, changes=DEEP, batch=8, epsilon=1e-6))


@pytest.mark.parametrize(
    ("sizes", "case"),
    [
        (MeshSizes(chunk=2), Case("streamed", checkpointing=True, length=41)),
        (MeshSizes(chunk=2), Case("streamed", checkpointing=True, length=41, architecture="gecko")),
        (MeshSizes(chunk=2), Case("streamed", length=3, architecture="gecko")),
        (
            MeshSizes(tensor=2),
            Case("packed", changes=(("share_emb", True), ("norm_prior_count", 2), ("swiglu", False))),
        ),
        (MeshSizes(chunk=2), Case("packed", changes=(("norm_prior_count", 2), ("scale_emb", True)))),
        (MeshSizes(shard=2), Case("streamed", length=3, changes=(("norm_prior_count", 2),))),
        (MeshSizes(chunk=2), Case("streamed", length=3, changes=(("norm_prior_count", 2),))),
        (MeshSizes(pipeline=2, chunk=2), Case("streamed", checkpointing=True)),
        (MeshSizes(pipeline=2), Case("streamed", virtual_stages=2, changes=DEEP)),
        (MeshSizes(shard=2), Case("packed", changes=TIED)),
        (MeshSizes(pipeline=2), Case("packed", changes=TIED)),
        (MeshSizes(pipeline=2, shard=2), Case("streamed", changes=TIED)),
        (MeshSizes(pipeline=2, tensor=2), Case("packed", virtual_stages=2, changes=(*DEEP, *TIED))),
    ],
    ids=[
        "checkpointing",
        "gecko-checkpointing",
        "gecko-few-tokens",
        "tied-prior",
        "prior",
        "prior-unused-on-a-rank",
        "prior-unused",
        "pipeline-checkpointing",
        "interleaved",
        "tied-shard",
        "tied-pipeline",
        "tied-pipeline-shard",
        "tied-interleaved-tensor",
    ],
)
def test_variants(ranks, sizes, case):
    check(ranks, sizes, case)


@pytest.mark.parametrize("sizes", TWO[1:2], ids=name)
def test_gradient_accumulation(ranks, sizes):
    case = Case("streamed")
    answers = ranks.run(2, train_on_mesh, sizes, Case("streamed", parts=2))
    assert_equal_training(case, expected(case), answers, TOLERANCE)
