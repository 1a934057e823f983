"""TimestepNorm's compiled loops against the definition in float64: outputs, gradients, documents, padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradients, segments

from megalodon.ops import Prior, compiled, timestep_norm
from megalodon.ops.timestep_norm import numba

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 60),
    groups=st.integers(1, 5),
    size=st.integers(1, 20),
    longest=st.sampled_from([0, 1, 4, 30]),
    padding=st.booleans(),
    prior_count=st.sampled_from([0, 3]),
    affine=st.booleans(),
    begun=st.booleans(),
)
def test_equals_the_definition(batch, length, groups, size, longest, padding, prior_count, affine, begun) -> None:
    dim = groups * size
    values = {"x": torch.randn(batch, length, dim) * 2 + 3}
    if affine:
        values |= {"weight": torch.randn(dim) * 0.3, "bias": torch.randn(dim)}
    statistics = {"mean": torch.randn(batch, groups), "var": torch.rand(batch, groups) + 0.2}
    statistics |= {"prior_mean": torch.randn(groups), "prior_var": torch.rand(groups) + 0.1}
    others = {
        "segment_ids": segments(batch, length, longest) if longest else None,
        "padding_mask": torch.rand(batch, length) < 0.3 if padding else None,
    }
    results = []
    for backend, dtype in (("reference", torch.float64), ("numba", torch.float32)):
        leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
        leaves |= {name: value.double().requires_grad_() for name, value in statistics.items()}
        given_ = {name: leaf for name, leaf in leaves.items() if name in values}
        if begun:
            given_ |= {"count": torch.arange(batch) * 5, "mean": leaves["mean"], "var": leaves["var"]}
        prior = Prior(prior_count, leaves["prior_mean"], leaves["prior_var"])
        scaled = given_ if affine else {**given_, "weight": None, "bias": None}
        y, count, mean, var = timestep_norm(**scaled, num_groups=groups, prior=prior, backend=backend, **others)
        outputs = (y.double(), mean.double(), var.double())
        results.append((*outputs, count.double(), *gradients(outputs, leaves).values()))
    # a group of one feature has no variance of its own: single tokens are divided by little more than sqrt(eps)
    bound = 1e-4 if size > 1 else 2e-2
    for expected, actual in zip(*results, strict=True):
        # what is zero but for rounding is measured by what it would be of other inputs: about 1
        assert (actual.double() - expected).abs().max() < bound * max(expected.abs().max(), 1)


def test_it_runs_and_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = numba._call
    monkeypatch.setattr(numba, "_call", lambda name, *a, **k: (calls.append(name), run(name, *a, **k)))
    x = torch.randn(2, 9, 12, requires_grad=True)
    timestep_norm(x, None, None, 3)[0].sum().backward()
    assert calls == ["norms.forward", "norms.backward"]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    x, before = torch.randn(3, 40, 24, requires_grad=True), torch.get_num_threads()

    def run() -> list[torch.Tensor]:
        y, _, mean, var = timestep_norm(x, None, None, 4)
        return [y, mean, var, *gradients((y, mean, var), {"x": x}).values()]

    expected = run()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(actual, value) for actual, value in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_pieces_give_what_the_whole_gives() -> None:
    x = torch.randn(2, 50, 12) + 5
    whole = timestep_norm(x, None, None, 3)
    state, outs = (None, None, None), []
    for piece in x.split(13, dim=1):
        y, *state = timestep_norm(piece, None, None, 3, *state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[1:], list(whole[2:]), rtol=1e-5, atol=1e-5)
