"""The causal convolution: the blocked forms against the definition, over kernels, documents, padding and histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative, segments
from torch import Tensor

from megalodon.ops import Layout, long_convolution
from megalodon.ops.long_convolution.blocked import _transform_length

TAPS = [1, 4, 17, 200]


def convolution_inputs(
    batch: int, length: int, taps: int, before: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Inputs with gradients."""
    values = {
        "x": torch.randn(batch, length, 3, dtype=dtype),
        "kernel": torch.randn(3, taps, dtype=dtype),
        "skip": torch.randn(3, dtype=dtype),
        "history": torch.randn(batch, before, 3, dtype=dtype),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 90),
    taps=st.sampled_from(TAPS),
    before=st.sampled_from([0, 1, 3, 50]),
    longest=st.sampled_from([0, 1, 5, 50]),
    padded=st.booleans(),
)
def test_blocked_equals_definition(batch: int, length: int, taps: int, before: int, longest: int, padded: bool) -> None:
    inputs = convolution_inputs(batch, length, taps, before)
    documents = segments(batch, length, longest) if longest else None
    lengths = torch.randint(0, length + 1, (batch,)) if padded else None
    layout = Layout(batch, length, segment_ids=documents, lengths=lengths)
    results = {}
    for backend in ("reference", "blocked"):
        outputs = long_convolution(**inputs, backend=backend, layout=layout)
        results[backend] = (*outputs, *gradients(outputs, inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert actual.shape == expected.shape
        if expected.numel():
            assert (actual - expected).detach().abs().max() < 1e-10 * max(1.0, float(expected.detach().abs().max()))


@pytest.mark.parametrize("taps", [3, 20])
def test_gradcheck(taps: int) -> None:
    inputs = convolution_inputs(2, 7, taps, 5)
    names = list(inputs)
    for documents in (None, segments(2, 7, 4)):

        def call(*values: Tensor, documents: Tensor | None = documents) -> tuple[Tensor, ...]:
            return long_convolution(**dict(zip(names, values, strict=True)), segment_ids=documents)

        assert gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("taps", TAPS)
def test_pieces_equal_the_whole_with_gradients(taps: int) -> None:
    inputs = convolution_inputs(2, 90, taps, 2)
    whole = long_convolution(**inputs)
    history, outputs = inputs["history"], []
    for start, stop in ((0, 1), (1, 40), (40, 42), (42, 90)):
        y, history = long_convolution(inputs["x"][:, start:stop], inputs["kernel"], inputs["skip"], history)
        outputs.append(y)
    pieces = (torch.cat(outputs, dim=1), history)
    assert all(p.shape == w.shape and relative(p, w) < 1e-11 for p, w in zip(pieces, whole, strict=True))
    expected, found = gradients(whole, inputs), gradients(pieces, inputs)
    assert all(relative(found[name], expected[name]) < 1e-10 for name in inputs)


def test_the_history_after_documents_and_padding_is_of_the_last_document() -> None:
    x = torch.arange(1.0, 13.0).reshape(2, 6, 1)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    layout = Layout(2, 6, segment_ids=ids, lengths=[5, 2])
    history = torch.full((2, 3, 1), 50.0)
    _, after = long_convolution(x, torch.ones(1, 4), history=history, layout=layout)
    assert after[..., 0].tolist() == [[0, 4, 5], [50, 7, 8]]


def test_bfloat16_input_is_summed_in_float32() -> None:
    inputs = {k: v.detach() for k, v in convolution_inputs(1, 300, 300, 10, torch.float32).items()}
    narrow = {k: v.bfloat16() if k in ("x", "history") else v for k, v in inputs.items()}
    y, history = long_convolution(**narrow)
    expected, _ = long_convolution(**{k: v.float() for k, v in narrow.items()})
    assert y.dtype == history.dtype == torch.bfloat16
    assert relative(y.float(), expected) < 2**-8


def test_transform_lengths_are_even_and_close() -> None:
    for least in range(1, 5000):
        size = _transform_length(least)
        assert size >= least and size % 2 == 0 and size <= max(2, 1.34 * least)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x is"),
        ({"kernel": torch.zeros(2, 3)}, "kernel has shape"),
        ({"kernel": torch.zeros(3, 0)}, "kernel has shape"),
        ({"skip": torch.zeros(2)}, "skip has shape"),
        ({"history": torch.zeros(1, 2, 3)}, "history has shape"),
        ({"segment_ids": torch.zeros(2, 4)}, "segment_ids"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    inputs = {k: v.detach() for k, v in convolution_inputs(2, 5, 3, 2).items()}
    with pytest.raises(ValueError, match=message):
        long_convolution(**{**inputs, **change})
