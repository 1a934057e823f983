"""TimestepDecayNorm: the blocked form against the definition, pieces against the whole, and joined spans."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative, segments
from torch import Tensor

from megalodon.ops import timestep_decay_norm
from megalodon.ops.timestep_decay_norm import Decay, DecayedStatistics, decayed_statistics, joined

GROUPS, DIM = 2, 6
BETAS = {"beta1": 0.9, "beta2": 0.97}


def leaves(batch: int, length: int) -> dict[str, Tensor]:
    values = {
        "x": torch.randn(batch, length, DIM) * 2 + 3,
        "weight": torch.randn(DIM) * 0.3,
        "bias": torch.randn(DIM),
        "mean": torch.randn(batch, GROUPS),
        "var": torch.rand(batch, GROUPS) + 0.2,
    }
    return {name: value.double().requires_grad_() for name, value in values.items()}


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 7, 63, 64, 65, 130, 200]),
    longest=st.sampled_from([0, 1, 4, 90]),
    padding=st.booleans(),
    bos=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_blocked_equals_definition(batch: int, length: int, longest: int, padding: bool, bos: bool, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = leaves(batch, length)
    others = {
        "count": torch.randint(1, 9, (batch,)),
        "segment_ids": segments(batch, length, longest) if longest else None,
        "padding_mask": torch.rand(batch, length) < 0.3 if padding else None,
        "bos_mask": torch.rand(batch, length) < 0.05 if bos else None,
    }
    results = {}
    for backend in ("reference", "blocked"):
        y, count, mean, var = timestep_decay_norm(**inputs, num_groups=GROUPS, **BETAS, **others, backend=backend)
        results[backend] = (y, count.double(), mean, var, *gradients((y, mean, var), inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert relative(actual, expected) < 1e-9


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=5), bos=st.booleans(), seed=st.integers(0, 2**31))
def test_pieces_equal_the_whole(cuts: list[int], bos: bool, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = leaves(2, 150)
    count = torch.tensor([0, 5])
    with torch.no_grad():
        inputs["mean"][0] = inputs["var"][0] = 0
    bos_mask = torch.rand(2, 150) < 0.03 if bos else torch.zeros(2, 150, dtype=torch.bool)
    shared = {"weight": inputs["weight"], "bias": inputs["bias"], "num_groups": GROUPS, **BETAS}
    state = (count, inputs["mean"], inputs["var"])
    whole = timestep_decay_norm(inputs["x"], **shared, count=state[0], mean=state[1], var=state[2], bos_mask=bos_mask)
    outputs, edges = [], [0, *sorted(cuts), 150]
    for start, stop in pairwise(edges):
        piece = inputs["x"][:, start:stop]
        flags = bos_mask[:, start:stop] if bos else None
        y, *state = timestep_decay_norm(piece, **shared, count=state[0], mean=state[1], var=state[2], bos_mask=flags)
        outputs.append(y)
    parts = (torch.cat(outputs, dim=1), *state)
    assert torch.equal(parts[1], whole[1])
    for actual, expected in zip((parts[0], *parts[2:]), (whole[0], *whole[2:]), strict=True):
        assert relative(actual, expected) < 1e-11
    found = gradients((parts[0], *parts[2:]), inputs)
    for name, expected in gradients((whole[0], *whole[2:]), inputs).items():
        assert relative(found[name], expected) < 1e-9


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), min_size=1, max_size=4), bos=st.booleans(), seed=st.integers(0, 2**31))
def test_spans_computed_apart_join_to_the_whole(cuts: list[int], bos: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 90, DIM, dtype=torch.float64)
    bos_mask = torch.rand(3, 90) < (0.02 if bos else 0)
    padding = torch.rand(3, 90) < 0.2
    before = DecayedStatistics(torch.tensor([3, 0, 9]), torch.randn(3, GROUPS).double(), torch.rand(3, GROUPS).double())
    before.mean[1] = before.var[1] = 0
    _, *expected = timestep_decay_norm(
        x, None, None, GROUPS, **BETAS, count=before.count, mean=before.mean, var=before.var, padding_mask=padding,
        bos_mask=bos_mask
    )  # fmt: skip
    edges = [0, *sorted(cuts), 90]
    found, later = before, None
    for start, stop in pairwise(edges):
        span = slice(start, stop)
        own = decayed_statistics(x[:, span], GROUPS, **BETAS, padding_mask=padding[:, span], bos_mask=bos_mask[:, span])
        restarted = (bos_mask & ~padding)[:, span].any(1)
        found = joined(found, own, restarted, Decay(0.9, 0.97))
        # grouped from the other side too
        later = (own, restarted) if later is None else (joined(later[0], own, restarted, Decay(0.9, 0.97)),
                                                        later[1] | restarted)  # fmt: skip
    grouped = joined(before, later[0], later[1], Decay(0.9, 0.97))
    for statistics in (found, grouped):
        assert torch.equal(statistics.count, expected[0])
        assert relative(statistics.mean, expected[1]) < 1e-12
        assert relative(statistics.var, expected[2]) < 1e-12


def test_gradcheck() -> None:
    inputs = leaves(2, 7)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 2, 3]])
    mask = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
    bos = torch.tensor([[0, 0, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0]]).bool()
    for backend in ("reference", "blocked"):

        def run(x, weight, bias, mean, var, backend=backend):
            y, _, *statistics = timestep_decay_norm(
                x, weight, bias, GROUPS, 0.9, 0.97, torch.tensor([4, 1]), mean, var, mask, bos, documents,
                backend=backend
            )  # fmt: skip
            return y, *statistics

        assert gradcheck(run, tuple(inputs.values()))


def test_a_packed_document_equals_itself_alone() -> None:
    x = torch.randn(1, 100, DIM)
    packed, *state = timestep_decay_norm(x, None, None, GROUPS, segment_ids=(torch.arange(100) >= 37).long()[None])
    alone, *own_state = timestep_decay_norm(x[:, 37:], None, None, GROUPS)
    assert relative(packed[:, 37:], alone) < 1e-6
    for actual, expected in zip(state, own_state, strict=True):
        assert relative(actual.double(), expected.double()) < 1e-12


def test_float32_follows_float64_where_the_correction_would_cancel() -> None:
    x = torch.randn(2, 300, DIM, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    upstream = torch.randn(2, 300, DIM)
    y, exact = timestep_decay_norm(x, None, None, GROUPS)[0], timestep_decay_norm(wide, None, None, GROUPS)[0]
    y.backward(upstream)
    exact.backward(upstream.double())
    assert relative(y.double(), exact) < 1e-6
    assert relative(x.grad.double(), wide.grad) < 2e-6


def test_bfloat16_activations_keep_wide_statistics() -> None:
    x = torch.randn(1, 4096, DIM).bfloat16() * 3
    state = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, GROUPS).bfloat16(), torch.zeros(1, GROUPS).bfloat16())
    for token in x.split(1, dim=1):
        y, *state = timestep_decay_norm(token, None, None, GROUPS, 0.999, 0.9999, *state)
    whole = timestep_decay_norm(x.double(), None, None, GROUPS)
    assert (y.dtype, state[1].dtype, state[2].dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert relative(state[1].double(), whole[2]) < 1e-4
    assert relative(state[2].double(), whole[3]) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 4}, "num_groups=4"),
        ({"num_groups": DIM}, f"num_groups={DIM}"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": 0.0}, "beta2=0.0"),
        ({"weight": torch.zeros(5)}, "weight"),
        ({"count": torch.zeros(2, dtype=torch.long)}, "mean, var missing"),
        ({"padding_mask": torch.zeros(2, 3)}, "padding_mask"),
        ({"bos_mask": torch.zeros(2, 4).bool()}, "bos_mask"),
        ({"segment_ids": torch.zeros(3, 3)}, "segment_ids"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timestep_decay_norm(**{"x": torch.zeros(2, 3, DIM), "weight": None, "bias": None, "num_groups": 2, **change})
