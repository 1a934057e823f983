"""Chunk attention: the blocked form against the definition, in float64, over lengths, prefixes and documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative, segments

from megalodon.ops import causal_attention, chunk_attention, rotate, rotations
from megalodon.ops.chunk_attention import causal


def tensors(batch: int, length: int, heads: int = 2) -> dict[str, torch.Tensor]:
    sizes = {"q": 4, "k": 4, "v": 6}
    return {n: torch.randn(batch, length, heads, d, dtype=torch.float64).requires_grad_() for n, d in sizes.items()}


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 45),
    chunk=st.sampled_from([1, 4, 7, 64]),
    longest=st.sampled_from([0, 3, 20]),
    prefix=st.sampled_from(["none", "equal", "uneven"]),
)
def test_blocked_equals_definition(batch: int, length: int, chunk: int, longest: int, prefix: str) -> None:
    inputs = tensors(batch, length)
    others: dict = {"chunk_size": chunk, "segment_ids": segments(batch, length, longest) if longest else None}
    if prefix != "none" and chunk > 1:
        width = int(torch.randint(1, chunk, ()))
        cached = tensors(batch, width)
        inputs |= {"prefix_k": cached["k"], "prefix_v": cached["v"]}
        if prefix == "uneven":
            others["prefix_lengths"] = torch.randint(0, width + 1, (batch,))
    results = {}
    for backend in ("reference", "blocked"):
        out = chunk_attention(**inputs, **others, backend=backend)
        results[backend] = (out, *gradients((out,), inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert relative(actual, expected) < 1e-10


def test_gradcheck_of_the_causal_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "STRIP", 3)
    inputs = tuple(tensors(2, 7).values())
    first = torch.tensor([[0, 0, 0, 3, 3, 3, 6], [0, 1, 1, 1, 1, 5, 5]])
    assert gradcheck(causal_attention, inputs)
    assert gradcheck(lambda q, k, v: causal_attention(q, k, v, 0, first), inputs)
    assert gradcheck(lambda q, k, v: causal_attention(q[:, 3:], k, v, 3), inputs)
    assert gradcheck(lambda q, k, v: causal_attention(q[:, 3:], k, v, torch.tensor([1, 3])), inputs)


@pytest.mark.parametrize("dropkey", [False, True])
def test_dropout_keeps_the_mean_and_sees_only_what_is_visible(dropkey: bool) -> None:
    q, k, v = (x.detach() for x in tensors(400, 6).values())
    q, k, v = q[:1].expand(400, -1, -1, -1), k[:1].expand(400, -1, -1, -1), torch.ones_like(v)
    v[:, -1] = 1e6  # only the last query may see the last value
    out = chunk_attention(q, k, v, 8, dropout=0.2, dropkey=dropkey)
    assert out[:, :-1].max() < 10
    mean = out[:, :-1].mean()
    assert abs(mean - 1) < (1e-9 if dropkey else 0.1)


def test_rotation_turns_adjacent_pairs() -> None:
    x = torch.randn(1, 5, 1, 4, dtype=torch.float64)
    turned = rotate(x, rotations(torch.arange(5), 4, 10000.0))
    angle = torch.tensor(3 * 10000.0**-0.5)
    a, b = x[0, 3, 0, 2], x[0, 3, 0, 3]
    assert turned[0, 3, 0, 2] == pytest.approx(float(a * angle.cos() - b * angle.sin()), rel=1e-6)
    assert turned[0, 3, 0, 3] == pytest.approx(float(a * angle.sin() + b * angle.cos()), rel=1e-6)
    assert torch.allclose(turned[:, 0], x[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 5)}, "q and k"),
        ({"v": torch.zeros(2, 4, 2, 5)}, "v has shape"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"prefix_k": torch.zeros(2, 1, 2, 4)}, "prefix_k and prefix_v"),
        ({"prefix_lengths": [1, 2]}, "open chunk holds 2"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    inputs = {"q": torch.zeros(2, 5, 2, 4), "k": torch.zeros(2, 5, 2, 4), "v": torch.zeros(2, 5, 2, 6), "chunk_size": 4}
    with pytest.raises(ValueError, match=message):
        chunk_attention(**{**inputs, **change})
