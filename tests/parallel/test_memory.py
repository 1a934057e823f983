"""The memory that the planner predicts, beside the height of real steps."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from living import Living
from parallel_cases import Case, build, own_parts

from megalodon.parallel import MeshSizes
from megalodon.parallel.memory import stage_memory
from megalodon.parallel.stage import stage_layers
from megalodon.parallel.traffic import Step


def peak_of_step(sizes: MeshSizes, case: Case) -> int:
    """Bytes of tensors at the height of a step on this rank, weights and optimiser included."""
    mesh, model = build(sizes, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = next(iter(case.batches()))
    parts = own_parts(mesh, case, batch, [None] * case.parts)
    model.accumulate_gradients(parts, 1.0)  # FSDP2 makes what it keeps at its first step
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    living = Living()
    for tensor in [*model.parameters(), *(x for kept in optimizer.state.values() for x in kept.values())]:
        living.see(tensor.detach())
    with living:
        model.accumulate_gradients(parts, 1.0)
    return living.peak


def planned(sizes: MeshSizes, case: Case) -> float:
    config = case.model().config
    bytes_ = 2 if case.precision == "bfloat16" else 4
    step = Step(case.batch // sizes.data // case.parts, case.parts, case.length, bytes_, case.checkpointing)
    ranges = stage_layers(config.num_layers, sizes.pipeline)
    return max(
        stage_memory(config, sizes, step, len(layers), place, False).total for place, layers in enumerate(ranges)
    )


def check(ranks, sizes: MeshSizes, case: Case) -> None:
    measured = max(ranks.run(sizes.world_size, peak_of_step, sizes, case))
    assert planned(sizes, case) == pytest.approx(measured, rel=0.1)


LARGER = (
    ("model_dim", 256),
    ("z_dim", 64),
    ("value_dim", 512),
    ("ffn_hidden_dim", 512),
    ("num_layers", 4),
    ("chunk_size", 256),
    ("norm_num_groups", 16),
    ("vocab_size", 512),
    ("cema_ndim", 16),
)


@pytest.mark.parametrize(
    ("sizes", "parts", "checkpointing"),
    [
        (MeshSizes(), 1, False),
        (MeshSizes(), 1, True),
        (MeshSizes(shard=2), 1, False),
        (MeshSizes(shard=2), 2, False),
        (MeshSizes(tensor=2), 1, False),
        (MeshSizes(chunk=2), 1, False),
        (MeshSizes(pipeline=2), 4, False),
    ],
    ids=str,
)
def test_memory_is_as_measured(ranks, sizes, parts, checkpointing):
    check(ranks, sizes, Case(length=1024, parts=parts, checkpointing=checkpointing, changes=LARGER))


WIDE = Case(
    length=2048,
    batch=2,
    changes=(
        ("model_dim", 384),
        ("z_dim", 96),
        ("value_dim", 768),
        ("ffn_hidden_dim", 1024),
        ("chunk_size", 512),
        ("vocab_size", 2048),
        ("swiglu", False),
    ),
)
NARROW = Case(
    length=1536,
    batch=4,
    changes=(
        ("model_dim", 128),
        ("z_dim", 32),
        ("value_dim", 256),
        ("ffn_hidden_dim", 384),
        ("num_layers", 10),
        ("chunk_size", 128),
        ("norm_num_groups", 32),
        ("vocab_size", 4096),
        ("cema_ndim", 16),
    ),
)


@pytest.mark.parametrize(
    ("sizes", "case"),
    [
        (MeshSizes(), replace(WIDE, precision="bfloat16")),
        (MeshSizes(tensor=2), replace(NARROW, precision="bfloat16", checkpointing=True)),
        (MeshSizes(pipeline=2), replace(NARROW, parts=2)),
        (MeshSizes(shard=2, chunk=2), NARROW),
        *(
            pytest.param(sizes, case, marks=pytest.mark.slow)
            for sizes, case in (
                (MeshSizes(), WIDE),
                (MeshSizes(), NARROW),
                (MeshSizes(shard=2), NARROW),
                (MeshSizes(shard=2), replace(WIDE, precision="bfloat16")),
                (MeshSizes(replicate=2), replace(NARROW, parts=2)),
                (MeshSizes(tensor=2), WIDE),
                (MeshSizes(chunk=2), replace(NARROW, checkpointing=True)),
                (MeshSizes(tensor=2, chunk=2), WIDE),
                (MeshSizes(pipeline=2, shard=2), replace(NARROW, parts=2)),
            )
        ),
    ],
    ids=str,
)
def test_memory_of_other_shapes(ranks, sizes, case):
    """None of these had a part in finding the model's terms."""
    check(ranks, sizes, case)
