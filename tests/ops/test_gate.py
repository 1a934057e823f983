"""The gate in one pass: against its two operations, values and gradients, over tiles that do not fit evenly."""

from __future__ import annotations

import pytest
import torch
from operator_cases import gradcheck
from torch.nn import functional as F

from megalodon.ops import compiled, gate
from megalodon.ops.gate import silu_product


def test_equals_its_two_operations_over_ragged_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CACHEFUL", 14)  # four rows of three, then the rest
    a, b = (torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 7, 3, dtype=torch.float64)
    actual = torch.autograd.grad(silu_product(a, b), (a, b), grad)
    expected = torch.autograd.grad(F.silu(a) * b, (a, b), grad)
    torch.testing.assert_close(silu_product(a, b), F.silu(a) * b)
    torch.testing.assert_close(actual, expected)
    assert gradcheck(silu_product, (a, b))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(silu_product(a, b), F.silu(a) * b)


def test_bfloat16_gradients_are_those_of_two_operations() -> None:
    a, b = (torch.randn(50, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    grad = torch.randn(50, 8, dtype=torch.bfloat16)
    actual = torch.autograd.grad(silu_product(a, b), (a, b), grad)
    torch.testing.assert_close(actual, torch.autograd.grad(F.silu(a) * b, (a, b), grad))


def test_unlike_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        silu_product(torch.randn(2, 3), torch.randn(2, 4))


@pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 5), (40, 1000), (2, 129)])
def test_compiled_form(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = gate.run
    monkeypatch.setattr(gate, "run", lambda name, **tensors: (calls.append(name), run(name, **tensors)))
    monkeypatch.setenv("MEGALODON_BACKEND", "numba")
    a, b = ((torch.randn(shape) * 4).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(shape).to(dtype)
    y = silu_product(a, b)
    actual = (y, *torch.autograd.grad(y, (a, b), grad))
    wide = [x.detach().double().requires_grad_() for x in (a, b)]
    exact = F.silu(wide[0]) * wide[1]
    expected = (exact, *torch.autograd.grad(exact, wide, grad.double()))
    assert calls == ["gates.forward", "gates.backward"]
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            value, reference.to(dtype), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-6
        )


@pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")
def test_compiled_form_of_extreme_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", "numba")
    a = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30, torch.nan], requires_grad=True)
    y = silu_product(a, torch.ones(6))
    torch.testing.assert_close(y, F.silu(a), equal_nan=True, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(f.sum(), a)[0][:5] for f in (y, F.silu(a))), atol=1e-6, rtol=1e-6)
