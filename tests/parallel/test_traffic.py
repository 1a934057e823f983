"""The bytes of each axis that the planner predicts, beside those that a step sends."""

from __future__ import annotations

import pytest
from communication import Communication
from parallel_cases import Case, build, own_parts

from megalodon import MegalodonConfig
from megalodon.parallel import Mesh, MeshSizes
from megalodon.parallel.stage import stage_layers
from megalodon.parallel.traffic import (
    Step,
    chunk_traffic,
    pipeline_traffic,
    tensor_traffic,
    weights_traffic,
)

DEEP = (("num_layers", 4),)


def axes_of(mesh: Mesh) -> dict[str, str]:
    """The axis of each group, by the group's name."""
    names = {mesh.group(axis).group_name: axis for axis in ("pipeline", "chunk", "tensor")}
    if mesh.weights is not None:
        kinds = ("replicate", "shard")[-mesh.weights.ndim :]
        names |= {mesh.weights.get_group(i).group_name: kind for i, kind in enumerate(kinds)}
    return names


def bytes_sent(sizes: MeshSizes, case: Case) -> dict[str, float]:
    """By axis, and this rank's place in the pipeline."""
    mesh, model = build(sizes, case)
    batch = next(iter(case.batches()))
    with Communication() as seen:
        model.accumulate_gradients(own_parts(mesh, case, batch, [None] * case.parts), 1.0)
    names = axes_of(mesh)
    return {"place": mesh.rank("pipeline")} | {names[group]: sent for group, sent in seen.bytes_.items()}


def predicted(sizes: MeshSizes, case: Case, place: int) -> dict[str, float]:
    config = case.model().config
    bytes_ = 2 if case.precision == "bfloat16" else 4
    step = Step(case.batch // sizes.data // case.parts, case.parts, case.length, bytes_, case.checkpointing)
    layers, first, last = (
        len(stage_layers(config.num_layers, sizes.pipeline)[place]),
        place == 0,
        place == sizes.pipeline - 1,
    )
    traffic = weights_traffic(config, sizes, step, layers, first, last) | {
        "tensor": tensor_traffic(config, sizes, step, layers, first, last),
        "chunk": chunk_traffic(config, sizes, step, layers, last),
        "pipeline": pipeline_traffic(config, sizes, step, first=first, last=last),
    }
    return {axis: value.bytes_ for axis, value in traffic.items() if value.bytes_}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (MeshSizes(chunk=2), {}),
        (MeshSizes(chunk=2), {"checkpointing": True}),
        (MeshSizes(tensor=2), {}),
        (MeshSizes(tensor=2), {"checkpointing": True}),
        (MeshSizes(shard=2), {}),
        (MeshSizes(shard=2), {"parts": 2, "checkpointing": True}),
        (MeshSizes(replicate=2), {"parts": 2}),
        (MeshSizes(replicate=2, shard=2), {}),
        (MeshSizes(tensor=2, chunk=2), {}),
        (MeshSizes(pipeline=4), {"parts": 4}),
        (MeshSizes(pipeline=2, shard=2), {"parts": 2}),
        (MeshSizes(pipeline=2), {"parts": 2, "changes": (*DEEP, ("share_emb", True))}),
    ],
    ids=str,
)
def test_bytes_on_the_wire_are_as_counted(ranks, sizes, options, precision):
    case = Case(**{"length": 64, "changes": DEEP, "precision": precision, **options})
    for counted in ranks.run(sizes.world_size, bytes_sent, sizes, case):
        expected = predicted(sizes, case, counted.pop("place"))
        assert expected == pytest.approx(counted, rel=0.002)


def test_bytes_of_chunks_do_not_grow_with_the_length(ranks):
    short, long = (ranks.run(2, bytes_sent, MeshSizes(chunk=2), Case(length=length)) for length in (64, 256))
    assert short == long


def test_pipeline_sends_activations_and_their_gradients():
    config = MegalodonConfig.from_preset("paper-7b")
    step = Step(rows=1, parts=8, length=32768, bytes_=2, checkpointing=False)
    sent = pipeline_traffic(config, MeshSizes(pipeline=2, chunk=4), step)
    assert sent.bytes_ == 2 * 8 * 8192 * 4096 * 4
