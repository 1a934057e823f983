"""bfloat16 on a mesh is as near to float32 as bfloat16 on one process is."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from parallel_cases import Case, build, own_parts, replace, train_on_mesh, train_whole
from test_meshes import PAIRS, TWO, name
from torch.distributed.tensor import DTensor

from megalodon.parallel import MeshSizes

expected = cache(train_whole)
CASE = Case("streamed", steps=5, precision="bfloat16")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative to the second's length."""
    both = [(one[key].float() - other[key].float(), other[key].float()) for key in one]
    return (sum(d.square().sum() for d, _ in both) / sum(x.square().sum() for _, x in both)).sqrt().item()


def check(ranks, sizes: MeshSizes) -> None:
    exact, half = expected(replace(CASE, precision="float32")), expected(CASE)
    answers = ranks.run(sizes.world_size, train_on_mesh, sizes, replace(CASE, parts=sizes.pipeline))
    for answer in answers:
        names = answer["gradients"].keys()
        error, usual = (
            distance(got, {key: exact["gradients"][key] for key in names})
            for got in (answer["gradients"], {key: half["gradients"][key] for key in names})
        )
        assert 0 < error < 1.5 * usual, (error, usual)
        torch.testing.assert_close(answer["losses"], half["losses"], rtol=2e-3, atol=0)
        assert answer["losses"] != exact["losses"]
        assert all(weight.dtype == torch.float32 for weight in answer["weights"].values())


@pytest.mark.parametrize("sizes", TWO, ids=name)
def test_two_processes(ranks, sizes):
    check(ranks, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", PAIRS, ids=name)
def test_four_processes(ranks, sizes):
    check(ranks, sizes)


def dtypes_of_a_step(sizes: MeshSizes) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """Of every parameter and its gradient."""
    mesh, model = build(sizes, CASE)
    batch = next(iter(CASE.batches()))
    model.accumulate_gradients(own_parts(mesh, CASE, batch, [None]), 1.0)
    local = {key: p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for key, p in model.named_parameters()}
    return {key: (p.dtype, local[key].dtype) for key, p in model.named_parameters()}


def test_weights_and_gradients_stay_in_float32(ranks):
    for dtypes in ranks.run(2, dtypes_of_a_step, MeshSizes(shard=2)):
        assert set(dtypes.values()) == {(torch.float32, torch.float32)}
