"""CEMA's compiled loops against the definition in float64: outputs, every gradient, states, documents, padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import cema_inputs, gradients, relative, segments

from megalodon.ops import Layout, cema, compiled
from megalodon.ops.cema import numba

pytestmark = pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")


def narrow(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values in float32, leaves again."""
    wide = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    return {name: value.detach().to(wide[value.dtype]).requires_grad_() for name, value in inputs.items()}


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 3 * numba.TOKENS + 5),
    parts=st.integers(1, 3),
    components=st.integers(1, 5),
    longest=st.sampled_from([0, 1, 5, 40]),
    state=st.booleans(),
)
def test_equals_the_definition(batch: int, length: int, parts: int, components: int, longest: int, state: bool) -> None:
    inputs = cema_inputs(batch, length, 16 * parts, components)
    if not state:
        del inputs["initial_state"]
    documents = segments(batch, length, longest) if longest else None
    results = []
    for backend, leaves in (("reference", inputs), ("numba", narrow(inputs))):
        y, last = cema(**leaves, segment_ids=documents, backend=backend)
        outputs = (y.double(), last.to(torch.complex128))
        results.append((*outputs, *gradients(outputs, leaves).values()))
    for expected, actual in zip(*results, strict=True):
        assert relative(actual.to(expected.dtype), expected) < 5e-6


def test_it_runs_and_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = numba._call
    monkeypatch.setattr(numba, "_call", lambda name, *a, **k: (calls.append(name), run(name, *a, **k)))
    inputs = narrow(cema_inputs(1, 20, 16, 2))
    y, _ = cema(**inputs)
    y.sum().backward()
    assert calls == ["average.forward", "average.backward"]


@pytest.mark.parametrize("case", ["float64", "narrow", "empty"])
def test_what_the_loops_do_not_take_goes_through_the_blocked_form(case: str) -> None:
    inputs = cema_inputs(2, 0 if case == "empty" else 9, 3 if case == "narrow" else 16, 2)
    leaves = inputs if case == "float64" else narrow(inputs)
    assert not numba.fits(leaves["x"])
    for actual, expected in zip(cema(**leaves, backend="numba"), cema(**leaves, backend="blocked"), strict=True):
        assert torch.equal(actual, expected)


def test_padding_leaves_the_state_alone_and_has_no_gradient() -> None:
    inputs, lengths = narrow(cema_inputs(3, 70, 16, 3)), [70, 33, 0]
    y, state = cema(**inputs, layout=Layout(3, 70, lengths=lengths), backend="numba")
    for row, length in enumerate(lengths):
        alone = {k: v[row : row + 1] if k in ("x", "initial_state") else v for k, v in inputs.items()}
        y_alone, state_alone = cema(**{**alone, "x": alone["x"][:, :length]}, backend="reference")
        assert relative(y[row, :length], y_alone[0]) < 5e-6
        assert relative(state[row], state_alone[0]) < 5e-6
        assert not y[row, length:].any()
    (dx,) = torch.autograd.grad(y.sum(), inputs["x"])
    assert dx[0].any() and not dx[1, 33:].any() and not dx[2].any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    inputs, before = narrow(cema_inputs(2, 50, 48, 3)), torch.get_num_threads()
    y, state = cema(**inputs, backend="numba")
    first = gradients((y, state), inputs)
    torch.set_num_threads(threads)
    try:
        outputs = cema(**inputs, backend="numba")
        again = gradients(outputs, inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], y) and torch.equal(outputs[1], state)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_long_memory_stays_exact() -> None:
    x = torch.randn(1, 20_000, 16)
    q = torch.full((16, 1), 0.9999 + 0.001j, dtype=torch.complex64)
    one = torch.ones(16, 1)
    y, _ = cema(x, one, q, one.to(torch.complex64), backend="numba")
    wide = cema(x.double(), one.double(), q.to(torch.complex128), one.to(torch.complex128), backend="blocked")[0]
    assert relative(y.double(), wide) < 5e-5


def test_bfloat16_is_widened() -> None:
    inputs = {k: v.detach() for k, v in narrow(cema_inputs(1, 60, 16, 4)).items()}
    y, state = cema(**{**inputs, "x": inputs["x"].bfloat16()}, backend="numba")
    expected, expected_state = cema(**{**inputs, "x": inputs["x"].bfloat16().float()}, backend="numba")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16()) and torch.equal(state, expected_state)
