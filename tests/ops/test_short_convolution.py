"""The short convolution by tiles: against its definition, with SiLU and without, over pieces that are carried."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import relative, segments
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops import Layout, compiled, short_convolution


def defined(x: Tensor, weight: Tensor, bias: Tensor | None, recent: Tensor, silu: bool) -> Tensor:
    """Of rows that are one document."""
    joined, taps = torch.cat([recent, x], 1), weight.shape[1]
    y = sum(joined[:, j : j + x.shape[1]] * weight[:, j] for j in range(taps))
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y


def inputs(batch: int, length: int, taps: int) -> list[Tensor]:
    shapes = ((batch, length, 3), (3, taps), (3,), (batch, taps - 1, 3))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("silu", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    taps=st.integers(1, 5),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    tile=st.sampled_from([1, 7, 40]),
    biased=st.booleans(),
)
def test_pieces_equal_the_definition_with_gradients(
    silu: bool, taps: int, pieces: list[int], tile: int, biased: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["megalodon.ops.short_convolution"], "CACHEFUL", tile)
        x, weight, bias, recent = inputs(2, sum(pieces), taps)
        given_bias = bias if biased else None
        leaves = [x, weight, recent, *([bias] if biased else [])]
        outputs, state = [], recent
        for piece in x.split(pieces, 1):
            y, state = short_convolution(piece, weight, given_bias, state, Layout(2, piece.shape[1]), silu)
            outputs.append(y)
        exact = defined(x, weight, given_bias, recent, silu)
        assert relative(torch.cat(outputs, 1), exact) < 1e-12
        last = torch.cat([recent, x], 1)[:, sum(pieces) :]
        assert torch.equal(state, last)
        upstream, after = torch.randn_like(exact), torch.randn_like(state)
        found = torch.autograd.grad((torch.cat(outputs, 1), state), leaves, (upstream, after))
        expected = torch.autograd.grad((exact, last), leaves, (upstream, after))
        assert all(relative(a, b) < 1e-11 for a, b in zip(found, expected, strict=True) if b.numel())


@pytest.mark.parametrize("silu", [False, True])
def test_documents_and_padding_are_alone(silu: bool) -> None:
    x, weight, bias, recent = inputs(2, 30, 4)
    documents = segments(2, 30, 6)
    y, state = short_convolution(x, weight, bias, recent, Layout(2, 30, segment_ids=documents), silu)
    for row in range(2):
        for number, part in enumerate(documents[row].unique_consecutive()):
            here = documents[row] == part
            before = recent[row : row + 1] if number == 0 else torch.zeros(1, 3, 3, dtype=x.dtype)
            alone = defined(x[row : row + 1, here], weight, bias, before, silu)
            assert relative(y[row, here], alone[0]) < 1e-12
        assert torch.equal(state[row], torch.cat([before[0], x[row, here]])[-3:])
    short = torch.tensor([2, 17])
    y, state = short_convolution(x, weight, bias, recent, Layout(2, 30, lengths=short), silu)
    for row, length in enumerate(short.tolist()):
        one = slice(row, row + 1)
        assert relative(y[one, :length], defined(x[one, :length], weight, bias, recent[one], silu)) < 1e-12
        assert torch.equal(state[row], torch.cat([recent[row], x[row, :length]])[-3:])


@pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("length", "taps", "biased"), [(2, 4, True), (3, 1, False), (300, 4, True), (70, 3, False)])
def test_compiled_form(silu: bool, length: int, taps: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_BACKEND", "numba")
    wider, recent = torch.randn(2, length, 90), torch.randn(2, taps - 1, 70)
    x = wider[..., 7:77].requires_grad_()  # a part of a wider tensor
    weight, bias = torch.randn(70, taps), torch.randn(70) if biased else None
    leaves = [x, *(value.requires_grad_() for value in (recent, weight, bias) if value is not None)]
    y, state = short_convolution(x, weight, bias, recent, Layout(2, length), silu)
    wide = [value.detach().double().requires_grad_() for value in leaves]
    exact = defined(wide[0], wide[2], wide[3] if biased else None, wide[1], silu)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, upstream)
    expected = torch.autograd.grad(exact, wide, upstream.double())
    assert relative(y.double(), exact) < 1e-6
    assert torch.equal(state, torch.cat([recent, x], 1)[:, length:])
    assert all(relative(a.double(), b) < 1e-5 for a, b in zip(found, expected, strict=True) if b.numel())
