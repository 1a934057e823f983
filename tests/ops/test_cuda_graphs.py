"""The operators, forward and backward, captured in a CUDA graph and replayed on new inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernel_cases import poisoned_and_fresh  # noqa: F401
from operator_cases import relative
from torch import Tensor

from megalodon.ops import cema, chunk_attention, timestep_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {"device": "cuda", "dtype": torch.bfloat16}


def of_cema() -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    angle, size = torch.rand(64, 4, device="cuda") * 6, torch.rand(64, 4, device="cuda") * 0.5 + 0.4
    values = {
        "x": torch.randn(2, 100, 64, **SHAPE),
        "p": torch.rand(64, 4, device="cuda"),
        "q": torch.polar(size, angle),
        "gamma": torch.randn(64, 4, device="cuda", dtype=torch.complex64),
    }
    return lambda **inputs: cema(**inputs, backend="triton")[0], values


def of_timestep_norm() -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    values = {"x": torch.randn(2, 100, 64, **SHAPE), "weight": torch.randn(64, device="cuda")}
    return lambda x, weight: timestep_norm(x, weight, None, 4, backend="triton")[0], values


def of_attention(form: str) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    values = {name: torch.randn(2, 100, 2, size, **SHAPE) for name, size in (("q", 16), ("k", 16), ("v", 96))}
    return partial(chunk_attention, chunk_size=40, backend=form), values


CASES = {
    "cema": of_cema,
    "timestep_norm": of_timestep_norm,
    "fused attention": partial(of_attention, "triton-fused"),
    "attention in strips": partial(of_attention, "triton-strips"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_replay_computes_what_a_call_does(name: str) -> None:
    run, inputs = CASES[name]()
    leaves = {key: value.requires_grad_() for key, value in inputs.items()}
    upstream = torch.randn_like(run(**leaves))

    def step() -> list[Tensor]:
        out = run(**leaves)
        return [out, *torch.autograd.grad(out, list(leaves.values()), upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[next(iter(leaves))].normal_()
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert relative(found, expected) < 1e-6
