"""The working memory: the blocked form against the definition, pieces against the whole, and maps that compose."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative, segments, tokens_in_windows, window_places
from torch import Tensor

from megalodon.ops import Segments, layout_of, working_memory
from megalodon.ops.working_memory import MemoryMap, absorb, memory_maps, span_log_mass

HEADS, DIM, WIDTH = 2, 4, 6


def tensors(batch: int, length: int, *names: str) -> dict[str, Tensor]:
    return tokens_in_windows(batch, length, HEADS, DIM, WIDTH, *names)


def memories(batch: int) -> dict[str, Tensor]:
    return {
        "memory": torch.randn(batch, HEADS, DIM, WIDTH, dtype=torch.float64).requires_grad_(),
        "log_mass": torch.randn(batch, HEADS, DIM, dtype=torch.float64).requires_grad_(),
    }


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 50),
    chunk=st.sampled_from([1, 3, 7, 32]),
    longest=st.sampled_from([0, 3, 40]),
    carried=st.sampled_from(["none", "equal", "uneven"]),
    padding=st.booleans(),
    bos=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_blocked_equals_definition(
    batch: int, length: int, chunk: int, longest: int, carried: str, padding: bool, bos: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = tensors(batch, length, "q", "k", "v")
    positions = torch.zeros(batch, dtype=torch.int64)
    if carried != "none":
        positions += torch.randint(0, 4 * chunk, (1,) if carried == "equal" else (batch,))
        inputs |= tensors(batch, chunk, "before_k", "before_v") | memories(batch)
        if chunk > 1:
            inputs |= tensors(batch, int((positions % chunk).max()) + 1, "open_k", "open_v")
    lengths = torch.randint(0, length + 1, (batch,)) if padding else None
    layout = layout_of(
        batch, length, torch.device("cpu"), chunk_size=chunk, positions=positions, lengths=lengths,
        segment_ids=segments(batch, length, longest) if longest else None,
    )  # fmt: skip
    places = window_places(positions, chunk)
    cut = Segments(torch.rand(batch, length) < 0.1, layout, places) if bos else None
    results = {}
    for backend in ("reference", "blocked"):
        y, memory, mass = working_memory(**inputs, chunk_size=chunk, layout=layout, segments=cut, backend=backend)
        nothing = 0 * sum(value.sum() for value in inputs.values())  # so that every output has gradients
        outputs = tuple(value + nothing for value in (y, memory, torch.exp(mass)))  # a log of nothing is -inf
        results[backend] = (*outputs, *gradients(outputs, inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert relative(actual, expected) < 1e-9 or (actual - expected).abs().max() < 1e-11


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6), bos=st.booleans(), seed=st.integers(0, 2**31))
def test_pieces_equal_the_whole(cuts: list[int], bos: bool, seed: int) -> None:
    torch.manual_seed(seed)
    chunk, inputs = 6, tensors(2, 60, "q", "k", "v")
    flags = torch.rand(2, 60) < (0.06 if bos else 0)
    whole = working_memory(**inputs, chunk_size=chunk, bos_mask=flags)
    outputs: list[Tensor] = []
    carried: tuple[Tensor, Tensor] | None = None
    state: dict[str, Tensor] = {}
    for start, stop in pairwise([0, *sorted(cuts), 60]):
        edge = start - start % chunk
        prefix: dict[str, Any] = {"open_k": inputs["k"][:, edge:start], "open_v": inputs["v"][:, edge:start]}
        if edge:
            prefix |= {f"before_{x}": inputs[x][:, edge - chunk : edge] for x in "kv"}
        piece = {name: value[:, start:stop] for name, value in inputs.items()}
        layout = layout_of(2, stop - start, torch.device("cpu"), positions=[start, start], chunk_size=chunk)
        cut = Segments(flags[:, start:stop], layout, carried)
        y, memory, mass = working_memory(**piece, **prefix, **state, chunk_size=chunk, layout=layout, segments=cut)
        outputs.append(y)
        state, carried = {"memory": memory, "log_mass": mass}, cut.after
    parts = (torch.cat(outputs, dim=1), *state.values())
    for actual, expected in zip(parts, whole, strict=True):
        assert relative(actual.exp(), expected.exp()) < 1e-12
    found = gradients(parts, inputs)
    for name, expected in gradients(whole, inputs).items():
        assert relative(found[name], expected) < 1e-10


def test_a_packed_document_equals_itself_alone() -> None:
    inputs = tensors(1, 70, "q", "k", "v")
    packed = working_memory(**inputs, chunk_size=8, segment_ids=(torch.arange(70) >= 19).long()[None])
    alone = working_memory(**{name: x[:, 19:] for name, x in inputs.items()}, chunk_size=8)
    assert relative(packed[0][:, 19:], alone[0]) < 1e-12
    assert relative(packed[1], alone[1]) < 1e-12
    assert relative(packed[2], alone[2]) < 1e-12


def test_gradcheck() -> None:
    chunk, inputs = 2, {**tensors(1, 9, "q", "k", "v"), **memories(1), **tensors(1, 2, "before_k", "before_v")}
    flags = torch.zeros(1, 9, dtype=torch.bool)
    flags[0, 3] = True
    documents = (torch.arange(9) >= 2).long()[None]
    for others in ({}, {"bos_mask": flags}, {"segment_ids": documents}):

        def run(*values, others=others):
            named = dict(zip(inputs, values, strict=True))
            y, memory, mass = working_memory(**named, chunk_size=chunk, **others)
            return y, memory, mass.exp()

        assert gradcheck(run, tuple(inputs.values()))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=3), forgets=st.booleans(), seed=st.integers(0, 2**31))
def test_maps_of_spans_compose_to_the_whole(cuts: list[int], forgets: bool, seed: int) -> None:
    torch.manual_seed(seed)
    k, v = (torch.randn(7, 2, 5, HEADS, d, dtype=torch.float64) for d in (DIM, WIDTH))  # 7 chunks of 2 rows
    state = memories(2)
    memory, mass = state["memory"].detach(), state["log_mass"].detach()
    keep = torch.rand(14) < 0.7 if forgets else torch.ones(14, dtype=torch.bool)
    live = torch.rand(14, 5) < 0.8
    live[:, -1] = True
    whole, masses = absorb(k, v, memory, mass, [2] * 7, live, keep)

    edges = [0, *sorted(set(cuts)), 7]
    spans = list(pairwise(edges))
    chosen = [slice(2 * a, 2 * b) for a, b in spans]
    own = [span_log_mass(k[a:b], [2] * (b - a), live[at], keep[at]) for (a, b), at in zip(spans, chosen, strict=True)]
    found: list[tuple[MemoryMap, Tensor]] = []
    before = mass
    for (a, b), at, log_mass in zip(spans, chosen, own, strict=True):
        found.append(memory_maps(k[a:b], v[a:b], before, [2] * (b - a), live[at], keep[at]))
        goes_on = keep[at].view(-1, 2).all(0)[:, None, None]
        before = torch.where(goes_on, torch.logaddexp(before, log_mass), log_mass)
        assert relative(before, masses[at][-2:]) < 1e-12

    total: MemoryMap | None = None
    entering = memory
    for (maps, _), at in zip(found, chosen, strict=True):
        count = len(maps.decay) // 2
        inside = MemoryMap(maps.decay.unflatten(0, (count, 2)), maps.added.unflatten(0, (count, 2)))
        assert relative(inside.apply(entering).flatten(0, 1), whole[at]) < 1e-11
        last = MemoryMap(maps.decay[-2:], maps.added[-2:])
        entering = last.apply(entering)
        total = last if total is None else last.after(total)
    assert total is not None
    assert relative(total.apply(memory), whole[-2:]) < 1e-11


def test_bfloat16_follows_float64_and_keeps_a_wide_memory() -> None:
    inputs = tensors(2, 100, "q", "k", "v")
    exact = working_memory(**inputs, chunk_size=8)
    low = working_memory(**{name: x.detach().bfloat16() for name, x in inputs.items()}, chunk_size=8)
    assert [x.dtype for x in low] == [torch.bfloat16, torch.float32, torch.float32]
    for actual, expected in zip(low, exact, strict=True):
        assert relative(actual.double(), expected) < 0.02


def test_rows_that_have_absorbed_nothing_start_afresh() -> None:
    inputs = {**tensors(2, 30, "q", "k", "v"), **tensors(2, 8, "before_k", "before_v")}
    given = working_memory(**inputs, **memories(2), chunk_size=8, positions=[8, 8])
    fresh = working_memory(**inputs, chunk_size=8, positions=[8, 8])
    for actual, expected in zip(given, fresh, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 5)}, "q and k"),
        ({"v": torch.zeros(2, 4, 2, 5)}, "v has shape"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"memory": torch.zeros(2, 2, 4, 6)}, "memory and log_mass"),
        ({"memory": torch.zeros(2, 2, 4, 6), "log_mass": torch.zeros(2, 2, 5)}, "log_mass has shape"),
        ({"open_v": torch.zeros(2, 1, 2, 6)}, "open_k and open_v"),
        ({"before_k": torch.zeros(2, 3, 2, 4)}, "before_k has 3 tokens"),
        ({"positions": [1, 2]}, "open chunk holds 2"),
        ({"positions": [4, 0]}, "before_k and before_v"),
        ({"bos_mask": torch.zeros(2, 5)}, "bos_mask"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    inputs = {"q": torch.zeros(2, 5, 2, 4), "k": torch.zeros(2, 5, 2, 4), "v": torch.zeros(2, 5, 2, 6), "chunk_size": 4}
    with pytest.raises(ValueError, match=message):
        working_memory(**{**inputs, **change})
