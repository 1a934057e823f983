"""The gated norm in one pass: against its operations, values and gradients, over tiles that do not fit evenly."""

from __future__ import annotations

import pytest
import torch
from operator_cases import gradcheck, relative
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops import compiled, gated_norm, gated_rms_norm


def defined(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    parts = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equals_its_operations_over_ragged_tiles(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_norm, "CACHEFUL", 20)  # three rows of six, then the rest
    y, z = (torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gated_rms_norm(y, z, weight, groups, 1e-5), defined(y, z, weight, groups, 1e-5))
    assert gradcheck(lambda *x: gated_rms_norm(*x, groups, 1e-5), (y, z, weight))


@pytest.mark.parametrize("backend", ["numba", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_wider_tensors_in_any_precision(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "numba" and compiled.missing() is not None:
        pytest.skip(f"no kernels: {compiled.missing()}")
    monkeypatch.setenv("MEGALODON_BACKEND", backend)
    both = torch.randn(2, 290, 40).to(dtype).requires_grad_()
    y, z = both.split(20, -1)
    weight = torch.rand(20).requires_grad_()
    out = gated_rms_norm(y, z, weight, 2, 1e-5)
    upstream = torch.randn(2, 290, 20).to(dtype)
    found = torch.autograd.grad(out, (both, weight), upstream)
    wide, wide_weight = both.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = defined(*wide.split(20, -1), wide_weight, 2, 1e-5)
    expected = torch.autograd.grad(exact, (wide, wide_weight), upstream.double())
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    assert out.dtype == dtype
    for actual, right in zip((out, *found), (exact, *expected), strict=True):
        assert relative(actual.double(), right) < bound


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (6,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    y, z, weight = torch.randn(shape), torch.randn(shape), torch.rand(6)
    torch.testing.assert_close(gated_rms_norm(y, z, weight, 3, 1e-5), defined(y, z, weight, 3, 1e-5))


@pytest.mark.parametrize(
    ("z", "weight", "groups", "message"),
    [((2, 5), 6, 1, "must be alike"), ((2, 6), 5, 1, "do not fit 6"), ((2, 6), 6, 4, "4 groups do not fit 6")],
)
def test_what_does_not_fit_is_named(z: tuple[int, ...], weight: int, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(torch.randn(2, 6), torch.randn(z), torch.rand(weight), groups, 1e-5)
