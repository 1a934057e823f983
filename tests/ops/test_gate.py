"""The gate in one pass: against its two operations, values and gradients, over tiles that do not fit evenly."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megalodon.ops import gate
from megalodon.ops.gate import silu_product


def test_equals_its_two_operations_over_ragged_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CACHEFUL", 14)  # four rows of three, then the rest
    a, b = (torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 7, 3, dtype=torch.float64)
    actual = torch.autograd.grad(silu_product(a, b), (a, b), grad)
    expected = torch.autograd.grad(F.silu(a) * b, (a, b), grad)
    torch.testing.assert_close(silu_product(a, b), F.silu(a) * b)
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(silu_product, (a, b))


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
