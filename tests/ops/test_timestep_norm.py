"""TimestepNorm: the blocked form against the definition, in float64, over masks, documents, states and priors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative, segments

from megalodon.ops import Prior, timestep_norm

GROUPS, DIM = 2, 6


def leaves(batch: int, length: int) -> dict[str, torch.Tensor]:
    values = {
        "x": torch.randn(batch, length, DIM) * 2 + 3,
        "weight": torch.randn(DIM) * 0.3,
        "bias": torch.randn(DIM),
        "mean": torch.randn(batch, GROUPS),
        "var": torch.rand(batch, GROUPS) + 0.2,
    }
    return {name: value.double().requires_grad_() for name, value in values.items()}


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 60),
    longest=st.sampled_from([0, 1, 4, 30]),
    padding=st.booleans(),
    prior_count=st.sampled_from([0, 3]),
)
def test_blocked_equals_definition(batch: int, length: int, longest: int, padding: bool, prior_count: int) -> None:
    inputs = leaves(batch, length)
    inputs["prior_mean"] = torch.randn(GROUPS, dtype=torch.float64, requires_grad=True)
    inputs["prior_var"] = (torch.rand(GROUPS, dtype=torch.float64) + 0.1).requires_grad_()
    others = {
        "count": torch.randint(0, 9, (batch,)),
        "segment_ids": segments(batch, length, longest) if longest else None,
        "padding_mask": torch.rand(batch, length) < 0.3 if padding else None,
        "prior": Prior(prior_count, inputs["prior_mean"], inputs["prior_var"]),
    }
    direct = {k: v for k, v in inputs.items() if not k.startswith("prior")}
    results = {}
    for backend in ("reference", "blocked"):
        y, count, mean, var = timestep_norm(**direct, num_groups=GROUPS, **others, backend=backend)
        results[backend] = (y, count.double(), mean, var, *gradients((y, mean, var), inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert relative(actual, expected) < 1e-9


def test_gradcheck() -> None:
    inputs = leaves(2, 7)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 2, 3]])
    mask = torch.tensor([[0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
    for backend in ("reference", "blocked"):

        def run(x, weight, bias, mean, var, backend=backend):
            y, _, *moments = timestep_norm(
                x, weight, bias, GROUPS, torch.tensor([4, 0]), mean, var, mask, documents, backend=backend
            )
            return y, *moments

        assert gradcheck(run, tuple(inputs.values()))


def test_statistics_of_a_long_stream_in_float32_follow_float64() -> None:
    x = torch.randn(1, 200_000, DIM) + torch.linspace(0, 5, 200_000)[None, :, None]
    state: tuple[torch.Tensor | None, ...] = (None, None, None)
    for piece in x.split(997, dim=1):
        _, *state = timestep_norm(piece, None, None, GROUPS, *state)
    groups = x.double().view(-1, GROUPS, DIM // GROUPS)
    assert int(state[0]) == 200_000
    assert relative(state[1][0].double(), groups.mean((0, 2))) < 1e-5
    assert relative(state[2][0].double(), groups.var((0, 2), correction=0)) < 1e-4


def test_statistics_take_the_dtype_of_the_mean() -> None:
    x = torch.randn(1, 4, DIM).bfloat16()
    y, _, mean, _ = timestep_norm(x, None, None, GROUPS)
    assert (y.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    wide = torch.zeros(1, GROUPS, dtype=torch.float64)
    assert (
        timestep_norm(x, None, None, GROUPS, torch.zeros(1, dtype=torch.long), wide, wide + 1)[2].dtype == torch.float64
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 4}, "num_groups=4"),
        ({"weight": torch.zeros(5)}, "weight"),
        ({"count": torch.zeros(2, dtype=torch.long)}, "mean, var missing"),
        ({"padding_mask": torch.zeros(2, 3)}, "padding_mask"),
        ({"segment_ids": torch.zeros(3, 3)}, "segment_ids"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timestep_norm(**{"x": torch.zeros(2, 3, DIM), "weight": None, "bias": None, "num_groups": GROUPS, **change})
