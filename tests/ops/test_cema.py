"""CEMA: the blocked form against the definition, in float64, over lengths, states, documents and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import cema_inputs, gradcheck, gradients, relative, segments

from megalodon.ops import Layout, cema
from megalodon.ops.cema.blocked import BLOCK, KeptTables, diagonal_sums_, powers, toeplitz


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 3 * BLOCK + 5),
    longest=st.sampled_from([0, 1, 5, 50]),
    state=st.booleans(),
)
def test_blocked_equals_definition(batch: int, length: int, longest: int, state: bool) -> None:
    inputs = cema_inputs(batch, length, 3, 2)
    if not state:
        del inputs["initial_state"]
    documents = segments(batch, length, longest) if longest else None
    results = {}
    for backend in ("reference", "blocked"):
        outputs = cema(**inputs, segment_ids=documents, backend=backend)
        results[backend] = (*outputs, *gradients(outputs, inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert relative(actual, expected) < 1e-10


@pytest.mark.parametrize("length", [1, 7, 40])
def test_gradcheck(length: int) -> None:
    inputs = cema_inputs(2, length, 2, 2)
    documents = segments(2, length, 9)
    names = list(inputs)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cema(**dict(zip(names, values, strict=True)), segment_ids=documents, backend="blocked")

    assert gradcheck(run, tuple(inputs.values()))
    reference = tuple(value.detach().requires_grad_() for value in inputs.values())
    assert gradcheck(lambda *values: cema(**dict(zip(names, values, strict=True)), backend="reference"), reference)


def test_padding_leaves_the_state_alone() -> None:
    inputs = cema_inputs(3, 70, 2, 3)
    lengths = [70, 33, 0]
    y, state = cema(**inputs, layout=Layout(3, 70, lengths=lengths))
    for row, length in enumerate(lengths):
        alone = {k: v[row : row + 1] if k in ("x", "initial_state") else v for k, v in inputs.items()}
        y_alone, state_alone = cema(**{**alone, "x": alone["x"][:, :length]}, backend="reference")
        assert relative(y[row, :length], y_alone[0]) < 1e-10
        assert relative(state[row], state_alone[0]) < 1e-10
        assert not y[row, length:].any()


def test_bfloat16_input_keeps_float32_coefficients() -> None:
    inputs = {k: v.detach() for k, v in cema_inputs(1, 300, 4, 4, torch.float32).items()}
    y, state = cema(**{**inputs, "x": inputs["x"].bfloat16()})
    expected, expected_state = cema(**{**inputs, "x": inputs["x"].bfloat16().float()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.complex64
    assert relative(y.float(), expected) < 2**-8
    assert relative(state, expected_state) < 5e-6


def test_decay_close_to_one_stays_exact_over_many_blocks() -> None:
    x = torch.randn(1, 20_000, 1)
    q = torch.tensor([[0.9999 + 0.001j]], dtype=torch.complex64)
    arguments = (torch.ones(1, 1), q, torch.ones(1, 1, dtype=torch.complex64))
    wide = (torch.ones(1, 1).double(), q.to(torch.complex128), torch.ones(1, 1, dtype=torch.complex128))
    # a state remembers 10,000 tokens here: float32 rounding of q alone moves the result by about 1e-5
    assert relative(cema(x, *arguments)[0].double(), cema(x.double(), *wide)[0]) < 5e-5


def test_toeplitz_holds_the_kernel() -> None:
    k = torch.randn(2, 6, dtype=torch.float64)
    kernel = toeplitz(k)
    for s in range(6):
        assert torch.equal(kernel[:, s, s:], k[:, : 6 - s])
        assert not kernel[:, s, :s].any()
    other = torch.randn(2, 6, 6, dtype=torch.float64)
    assert relative((kernel * other).sum(), (k * diagonal_sums_(other.clone())).sum()) < 1e-12


def test_powers_and_their_gradient() -> None:
    q = torch.polar(torch.rand(3, 2).double(), torch.rand(3, 2).double()).requires_grad_()
    table = torch.view_as_complex(powers(q, 21).unflatten(-1, (-1, 2)))
    for t in range(21):
        assert relative(table[:, t], q ** (t + 1)) < 1e-12
    assert gradcheck(lambda q: powers(q, 21), (q,))
    for n in (1, 5):
        assert gradcheck(lambda q, n=n: torch.bmm(torch.ones(3, 7, 4).double(), powers(q, n).mT), (q,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x is"),
        ({"p": torch.zeros(5, 2)}, "p is"),
        ({"q": torch.zeros(3, 2)}, "q is"),
        ({"initial_state": torch.zeros(1, 3, 2, dtype=torch.complex64)}, "initial_state"),
        ({"segment_ids": torch.zeros(2, 4)}, "segment_ids"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    inputs = {k: v.detach() for k, v in cema_inputs(2, 5, 3, 2).items()}
    with pytest.raises(ValueError, match=message):
        cema(**{**inputs, **change})


@pytest.mark.parametrize("length", [1, 31, 32, 63, 64, 200])
def test_kept_tables_change_no_bit_and_follow_the_coefficients(length: int) -> None:
    kept, inputs = KeptTables(), cema_inputs(2, length, 6, 3, torch.float32)
    for factor in (1.0, 1.0, 0.5):
        changed = {**inputs, "q": factor * inputs["q"]}
        with torch.no_grad():
            plain, again = (cema(**changed, backend="blocked", kept=store) for store in (None, kept))
        assert all(map(torch.equal, plain, again))
    outputs = cema(**inputs, backend="blocked", kept=kept)
    assert all(gradient is not None for gradient in gradients(outputs, inputs).values())
