"""Sliding chunk attention: the blocked form against the definition, in float64, over places, documents and segments."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative, segments, tokens_in_windows, window_places
from torch import Tensor

from megalodon.ops import Segments, Visible, layout_of, sliding_chunk_attention, two_chunk_attention
from megalodon.ops.sliding_chunk_attention import window

HEADS = 2


def tensors(batch: int, length: int, *names: str) -> dict[str, Tensor]:
    return tokens_in_windows(batch, length, HEADS, 4, 6, *names)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    chunk=st.sampled_from([1, 4, 7, 64]),
    longest=st.sampled_from([0, 3, 30]),
    carried=st.sampled_from(["none", "equal", "uneven"]),
    padding=st.booleans(),
    bos=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_blocked_equals_definition(
    batch: int, length: int, chunk: int, longest: int, carried: str, padding: bool, bos: bool, turned: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = tensors(batch, length, "q", "k", "v", *(["q_before"] if turned else []))
    positions = torch.zeros(batch, dtype=torch.int64)
    if carried != "none":
        positions += torch.randint(0, 4 * chunk, (1,) if carried == "equal" else (batch,))
        inputs |= tensors(batch, chunk, "before_k", "before_v")
        if chunk > 1:
            inputs |= tensors(batch, int((positions % chunk).max()) + 1, "open_k", "open_v")
    lengths = torch.randint(0, length + 1, (batch,)) if padding else None
    if lengths is not None:
        lengths[0] = length
    layout = layout_of(
        batch, length, torch.device("cpu"), chunk_size=chunk, positions=positions, lengths=lengths,
        segment_ids=segments(batch, length, longest) if longest else None,
    )  # fmt: skip
    cut = Segments(torch.rand(batch, length) < 0.1, layout, window_places(positions, chunk)) if bos else None
    results = {}
    for backend in ("reference", "blocked"):
        out = sliding_chunk_attention(**inputs, chunk_size=chunk, layout=layout, segments=cut, backend=backend)
        results[backend] = (out, *gradients((out,), inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert relative(actual, expected) < 1e-10 or (actual - expected).abs().max() < 1e-12


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 45), max_size=6), bos=st.booleans(), seed=st.integers(0, 2**31))
def test_pieces_equal_the_whole(cuts: list[int], bos: bool, seed: int) -> None:
    torch.manual_seed(seed)
    chunk, inputs = 6, tensors(2, 45, "q", "q_before", "k", "v")
    flags = torch.rand(2, 45) < (0.1 if bos else 0)
    whole = sliding_chunk_attention(**inputs, chunk_size=chunk, bos_mask=flags)
    outputs, carried = [], None
    for start, stop in pairwise([0, *sorted(cuts), 45]):
        open_, edge = start % chunk, start - start % chunk
        prefix: dict[str, Any] = {"open_k": inputs["k"][:, edge:start], "open_v": inputs["v"][:, edge:start]}
        if edge:
            prefix |= {f"before_{x}": inputs[x][:, edge - chunk : edge] for x in "kv"}
        piece = {name: value[:, start:stop] for name, value in inputs.items()}
        layout = layout_of(2, stop - start, torch.device("cpu"), positions=[start, start], chunk_size=chunk)
        cut = Segments(flags[:, start:stop], layout, carried)
        outputs.append(sliding_chunk_attention(**piece, **prefix, chunk_size=chunk, layout=layout, segments=cut))
        carried = cut.after
        assert open_ == layout.uniform_offset
    assert relative(torch.cat(outputs, dim=1), whole) < 1e-12


def test_a_packed_document_equals_itself_alone() -> None:
    inputs = tensors(1, 50, "q", "q_before", "k", "v")
    packed = sliding_chunk_attention(**inputs, chunk_size=8, segment_ids=(torch.arange(50) >= 19).long()[None])
    alone = sliding_chunk_attention(**{name: x[:, 19:] for name, x in inputs.items()}, chunk_size=8)
    assert relative(packed[:, 19:], alone) < 1e-12


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(2, 29, "q", "q_before", "k", "v")
    whole = sliding_chunk_attention(**inputs, chunk_size=8)
    expected = gradients((whole,), inputs)
    monkeypatch.setattr(window, "STRIP", 3)
    strips = sliding_chunk_attention(**inputs, chunk_size=8)
    assert relative(strips, whole) < 1e-13
    for name, actual in gradients((strips,), inputs).items():
        assert relative(actual, expected[name]) < 1e-12


def test_gradcheck_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "STRIP", 2)
    q, turned, k, v = tensors(4, 3, "q", "q_before", "k", "v").values()
    first = torch.tensor([[0, 1, 2], [3, 3, 5], [0, 0, 0], [2, 4, 4]])

    def chained(q, turned, k, v, before_k, before_v):
        return two_chunk_attention(q, turned, k, v, (before_k, before_v), Visible(0, first), chain=2)

    assert gradcheck(chained, (q, turned, k, v, *tensors(2, 3, "k", "v").values()))
    assert gradcheck(lambda *x: two_chunk_attention(*x, None, chain=2), (q, turned, k, v))
    assert gradcheck(lambda q, k, v: two_chunk_attention(q, None, k, v, None, chain=1), (q, k, v))

    def apart(q, turned, k, v, before_k, before_v):
        return two_chunk_attention(
            q[:, 1:], turned[:, 1:], k, v, (before_k, before_v), Visible(torch.tensor([0, 1, 1, 0]))
        )

    assert gradcheck(apart, (q, turned, k, v, *tensors(4, 5, "k", "v").values()))


@pytest.mark.parametrize("dropkey", [False, True])
def test_dropout_keeps_the_mean_and_sees_only_what_is_visible(dropkey: bool) -> None:
    q, k, v = (x.detach() for x in tensors(400, 10, "q", "k", "v").values())
    q, k, v = q[:1].expand(400, -1, -1, -1), k[:1].expand(400, -1, -1, -1), torch.ones_like(v)
    v[:, -1] = 1e6  # only the last query may see the last value
    v[:, 0] = 1e6  # and those of the third chunk see none of the first
    out = sliding_chunk_attention(q, k, v, 4, dropout=0.2, dropkey=dropkey)
    assert out[:, 8:-1].max() < 10
    mean = out[:, 8:-1].mean()
    assert abs(mean - 1) < (1e-9 if dropkey else 0.1)


def test_bfloat16_follows_float64() -> None:
    inputs = tensors(2, 40, "q", "q_before", "k", "v")
    exact = sliding_chunk_attention(**inputs, chunk_size=8)
    low = sliding_chunk_attention(**{name: x.detach().bfloat16() for name, x in inputs.items()}, chunk_size=8)
    assert low.dtype == torch.bfloat16
    assert relative(low.double(), exact) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 5)}, "q and k"),
        ({"v": torch.zeros(2, 4, 2, 5)}, "v has shape"),
        ({"q_before": torch.zeros(2, 4, 2, 4)}, "q_before has shape"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"open_k": torch.zeros(2, 1, 2, 4)}, "open_k and open_v"),
        ({"before_k": torch.zeros(2, 3, 2, 4)}, "before_k has 3 tokens"),
        ({"positions": [1, 2]}, "open chunk holds 2"),
        ({"positions": [4, 0]}, "before_k and before_v"),
        ({"bos_mask": torch.zeros(2, 5)}, "bos_mask"),
        ({"bos_places": (torch.zeros(3), torch.zeros(2))}, "bos_places"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    inputs = {"q": torch.zeros(2, 5, 2, 4), "k": torch.zeros(2, 5, 2, 4), "v": torch.zeros(2, 5, 2, 6), "chunk_size": 4}
    with pytest.raises(ValueError, match=message):
        sliding_chunk_attention(**{**inputs, **change})
