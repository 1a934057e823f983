"""The loss by Liger's fused operator, interpreted, beside the plain one: value, gradients, where it must not run."""

from __future__ import annotations

import pytest
import torch
from model_cases import VOCABULARY, gradient_difference, gradients, relative, tiny_model, tokens
from torch import nn
from torch.nn import functional as F

from megalodon.models import loss as losses

pytest.importorskip("triton", reason="Triton runs on Linux only")
pytest.importorskip("liger_kernel", reason="an optional package")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted, here")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The kernels asked for; whether each loss was a fused one."""
    monkeypatch.setenv("MEGALODON_BACKEND", "triton")
    asked: list[bool] = []
    may = losses._is_fused

    def watched(head: nn.Linear, x: torch.Tensor) -> bool:
        asked.append(may(head, x))
        return asked[-1]

    monkeypatch.setattr(losses, "_is_fused", watched)
    return asked


def expected_sum(head: nn.Linear, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(x).flatten(0, 1).double(), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients(dtype: torch.dtype, fused: list[bool]) -> None:
    head = nn.Linear(8, 301, bias=False, dtype=dtype)
    x = torch.randn(2, 7, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 301, (2, 7))
    targets[0, 3] = targets[1, 0] = -100
    found, expected = losses.summed_loss(head, x, targets), expected_sum(head, x, targets)
    assert fused == [True] and found.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative(found, expected.float()) < tolerance
    inputs = (x, head.weight)
    pairs = zip(*(torch.autograd.grad(3 * value, inputs) for value in (found, expected)), strict=True)
    assert max(relative(*pair) for pair in pairs) < 2 * tolerance
    with torch.no_grad():
        assert relative(losses.summed_loss(head, x, targets), expected.float()) < tolerance


def test_a_training_step_of_the_model(fused: list[bool]) -> None:
    model = tiny_model(num_layers=1).train()
    ids = tokens(1, 9)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model(ids, labels=ids, use_cache=False, return_logits=False).loss.backward()
    assert fused == [True]
    assert gradient_difference(gradients(model), expected) < 5e-6


def test_where_it_would_be_wrong_the_plain_one_runs(fused: list[bool]) -> None:
    head, x = nn.Linear(8, VOCABULARY, bias=False), torch.randn(1, 5, 8)
    targets = torch.randint(0, VOCABULARY, (1, 5))
    losses.summed_loss(head, x, targets).backward()  # a head trained alone
    assert fused == [False] and head.weight.grad is not None
    biased = nn.Linear(8, VOCABULARY)
    assert relative(losses.summed_loss(biased, x, targets), expected_sum(biased, x, targets).float()) < 1e-6
    head.register_forward_hook(lambda *_: torch.zeros(5, VOCABULARY))
    x.requires_grad_()
    assert relative(losses.summed_loss(head, x, targets), 5 * torch.log(torch.tensor(float(VOCABULARY)))) < 1e-6
    assert fused == [False, False, False]


def test_only_beside_the_kernels(fused: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", "blocked")
    head, x = nn.Linear(8, VOCABULARY, bias=False), torch.randn(1, 5, 8, requires_grad=True)
    losses.summed_loss(head, x, torch.randint(0, VOCABULARY, (1, 5)))
    assert fused == [False]
