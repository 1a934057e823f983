"""Several operations as one, compiled: values and gradients against their definitions in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon import ops
from megalodon.ops import compiled, gate, queries

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")
EPS = 1e-5


@pytest.fixture(autouse=True)
def numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", "numba")


def check(operator: Callable[..., Any], definition: Callable[..., Any], inputs: list[Tensor]) -> None:
    """That results and all gradients are those of the definition in float64, to a few units of float32."""
    narrow, wide = ([x.to(t).requires_grad_() for x in inputs] for t in (torch.float32, torch.float64))
    found, exact = operator(*narrow), definition(*wide)
    found, exact = ((y if isinstance(y, tuple) else (y,)) for y in (found, exact))
    grads = [torch.randn_like(y) for y in found]
    pairs = [*zip(found, exact, strict=True)]
    derived = torch.autograd.grad(exact, wide, [grad.double() for grad in grads])
    pairs += zip(torch.autograd.grad(found, narrow, grads), derived, strict=True)
    for value, reference in pairs:
        error = (value.double() - reference).abs().max()
        assert value.dtype == torch.float32 and error <= 2e-6 * reference.abs().max()


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 70, 33), (130, 8)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    size = shape[-1:]
    check(
        lambda x, weight: ops.rms_norm(x, weight, EPS),
        lambda x, weight: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight,
        [torch.randn(shape), torch.rand(size) + 0.5],
    )


@pytest.mark.parametrize(("shape", "by_row"), [((1, 1, 1, 2), False), ((2, 70, 2, 8), False), ((2, 37, 3, 34), True)])
def test_queries_and_keys(shape: tuple[int, int, int, int], by_row: bool) -> None:
    batch, length, heads, size = shape
    positions = torch.arange(batch * length).view(batch, length) if by_row else torch.arange(length)
    angles = positions[..., None] * 100.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = ops.rotations(positions, size, 100.0)

    def definition(z: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        n = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()
        cosine, sine = angles.cos()[..., None, :], angles.sin()[..., None, :]
        found = []
        for s, b in zip(scale, bias, strict=True):
            even, odd = (n * s + b).unflatten(-1, (-1, 2)).unbind(-1)
            found.append(torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2))
        return found[0], found[1]

    check(
        lambda z, scale, bias: ops.queries_and_keys(z, scale, bias, turns, EPS),
        definition,
        [torch.randn(shape), torch.randn(2, heads, size), torch.randn(2, heads, size)],
    )


@pytest.mark.parametrize("adds", [True, False])
def test_gated_linear(adds: bool) -> None:
    inputs = [torch.randn(5, 211, 13), torch.randn(5, 211, 13), torch.randn(7, 13), torch.randn(5, 211, 7)]
    check(
        ops.gated_linear,
        lambda a, b, weight, *residual: (a * torch.sigmoid(a) * b) @ weight.T + sum(residual),
        inputs[: 3 + adds],
    )


def test_feed_forward() -> None:
    def definition(y: Tensor, scale: Tensor, bias: Tensor, up: Tensor, side: Tensor, down: Tensor) -> Tensor:
        n = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + EPS).sqrt() * scale + bias
        return (F.silu(n @ up.T) * (n @ side.T)) @ down.T

    check(
        lambda y, scale, bias, *weights: ops.feed_forward(y, scale, bias, EPS, *weights),
        definition,
        [torch.randn(3, 70, 16), torch.rand(16) + 0.5, torch.randn(16), *torch.randn(2, 40, 16), torch.randn(16, 40)],
    )


def test_frozen_weights_get_no_gradient() -> None:
    y, up, side, down = torch.randn(3, 16, requires_grad=True), *torch.randn(2, 8, 16), torch.randn(16, 8)
    ops.feed_forward(y, None, None, EPS, up, side, down).sum().backward()
    assert y.grad is not None and up.grad is None


def test_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    norms = sys.modules["megalodon.ops.rms_norm"]  # the function has the module's name
    for module, name in ((gate, "run"), (norms, "_run"), (queries, "_run")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda n, *a, run=run, **k: (called.append(n), run(n, *a, **k)))
    ops.rms_norm(torch.randn(2, 4), torch.ones(4), EPS)
    turns = ops.rotations(torch.arange(3), 4, 100.0)
    ops.queries_and_keys(torch.randn(1, 3, 1, 4), torch.ones(2, 1, 4), torch.zeros(2, 1, 4), turns, EPS)
    ops.gated_linear(torch.randn(2, 4), torch.randn(2, 4), torch.randn(3, 4))
    assert called == ["tokens.norm_forward", "tokens.queries_forward", "gates.forward"]


@pytest.mark.parametrize("length", [1, 16, 41])
def test_attention_that_activates_its_values(length: int) -> None:
    def definition(q: Tensor, k: Tensor, u: Tensor) -> Tensor:
        return ops.chunk_attention(q, k, u * torch.sigmoid(u), 16, backend="reference")

    check(
        lambda q, k, u: ops.chunk_attention(q, k, u, 16, activates=True),
        definition,
        [torch.randn(2, length, 2, 4), torch.randn(2, length, 2, 4), torch.randn(2, length, 2, 12)],
    )
