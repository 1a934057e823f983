"""Sampling: each setting does what it says, on any logits, and a seed means the same every time."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalodon.inference import Sampling, distribution, sample

NOTHING = torch.zeros(1, 0, dtype=torch.int64)
logits_rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True).map(
    lambda x: torch.tensor([x])
)


@settings(deadline=None)
@given(logits=logits_rows, temperature=st.floats(0.1, 5))
def test_temperature_divides_logits(logits: Tensor, temperature: float) -> None:
    expected = (logits.double() / temperature).softmax(-1)
    actual = distribution(logits, NOTHING, Sampling(temperature=temperature))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(logits=logits_rows, k=st.integers(1, 15))
def test_top_k_keeps_the_k_likeliest(logits: Tensor, k: int) -> None:
    kept = distribution(logits, NOTHING, Sampling(top_k=k))[0] > 0
    k = min(k, logits.shape[-1])
    assert set(kept.nonzero()[:, 0].tolist()) == set(logits[0].topk(k).indices.tolist())


@settings(deadline=None)
@given(logits=logits_rows, p=st.floats(0.05, 0.95))
def test_top_p_keeps_the_fewest_that_reach_it(logits: Tensor, p: float) -> None:
    full = logits.double().softmax(-1)[0]
    kept = distribution(logits, NOTHING, Sampling(top_p=p))[0] > 0
    assert full[kept].sum() >= p - 1e-5
    assert full[kept].sum() - full[kept].min() < p + 1e-5
    assert not (~kept).any() or full[kept].min() >= full[~kept].max()


@settings(deadline=None)
@given(logits=logits_rows, p=st.floats(0.01, 0.9))
def test_min_p_is_relative_to_the_likeliest(logits: Tensor, p: float) -> None:
    full = logits.double().softmax(-1)[0]
    kept = distribution(logits, NOTHING, Sampling(min_p=p))[0] > 0
    clear = (full - p * full.max()).abs() > 1e-6
    assert torch.equal(kept[clear], (full >= p * full.max())[clear])


def test_repetition_penalty_weakens_recent_tokens_of_either_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    penalised = distribution(logits, torch.tensor([[0, 1, 1]]), Sampling(repetition_penalty=2.0))
    torch.testing.assert_close(penalised, torch.tensor([[1.0, -4.0, 1.0]]).softmax(-1))


@settings(deadline=None)
@given(logits=logits_rows, top_k=st.integers(0, 3), top_p=st.floats(0.1, 1.0), min_p=st.floats(0, 0.9))
def test_temperature_zero_is_greedy_whatever_else(logits: Tensor, top_k: int, top_p: float, min_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    chosen = sample(logits, NOTHING, Sampling(0.0, top_k, top_p, min_p), generator)
    assert chosen.tolist() == logits.argmax(-1).tolist()
    assert torch.equal(generator.get_state(), before)


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    drawn = sample(logits, torch.zeros(20000, 0, dtype=torch.int64), Sampling(), torch.Generator().manual_seed(1))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.02)


def test_a_seed_means_the_same_every_time() -> None:
    logits = torch.randn(64, 50)
    recent = torch.zeros(64, 0, dtype=torch.int64)
    drawn = [sample(logits, recent, Sampling(), torch.Generator().manual_seed(s)).tolist() for s in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e-320),
        ("temperature", 1e308),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-320),
        ("repetition_penalty", float("inf")),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value};")):
        Sampling(**{field: value})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        sample(torch.tensor([[0.0, bad]]), NOTHING, Sampling())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=20, top_p=0.9, min_p=0.01), Sampling(0)])
def test_a_row_with_a_generator_of_its_own_does_not_depend_on_the_others(sampling: Sampling) -> None:
    logits, recent = 3 * torch.randn(37, 257), torch.zeros(37, 0, dtype=torch.int64)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(37)]

    together = [sample(logits, recent, sampling, own).tolist() for own in [generators()] for _ in range(3)]
    for row, generator in enumerate(generators()):
        alone = [int(sample(logits[row : row + 1], recent[:1], sampling, generator)) for _ in range(3)]
        assert alone == [tokens[row] for tokens in together]
