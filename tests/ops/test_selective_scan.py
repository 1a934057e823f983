"""The selective scan: the blocked forms against the definition, over lengths, states, documents, padding and dtypes."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative, segments
from torch import Tensor

from megalodon.ops import Layout, compiled, selective_scan
from megalodon.ops.selective_scan.scalar import CHUNK, SPAN

FORMS = ["channels", "heads", "discrete"]


def scan_inputs(form: str, batch: int, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Inputs of one form, with gradients: a decay per channel, per head, or given as it is."""
    outer: tuple[int, ...] = (6,) if form == "channels" else (4, 3)
    weights = (batch, length, 5) if form == "channels" else (batch, length, 2, 5)
    steps = torch.nn.functional.softplus(torch.randn(batch, length, outer[0], dtype=dtype))
    values = {
        "x": torch.randn(batch, length, *outer, dtype=dtype),
        "dt": -steps if form == "discrete" else steps,
        "a": -torch.rand(*(6, 5) if form == "channels" else (4,), dtype=dtype) - 0.1,
        "b": torch.randn(weights, dtype=dtype),
        "c": torch.randn(weights, dtype=dtype),
        "skip": torch.randn(outer[0], dtype=dtype),
        "initial_state": torch.randn(batch, *outer, 5, dtype=dtype),
    }
    if form == "discrete":
        del values["a"]
    return {name: value.requires_grad_() for name, value in values.items()}


def run(inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    return selective_scan(**{"a": None, **inputs}, **options)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 2 * CHUNK + 9),
    longest=st.sampled_from([0, 1, 5, 90]),
    padded=st.booleans(),
    state=st.booleans(),
)
def test_blocked_equals_definition(form: str, batch: int, length: int, longest: int, padded: bool, state: bool) -> None:
    inputs = scan_inputs(form, batch, length)
    if not state:
        del inputs["initial_state"]
    documents = segments(batch, length, longest) if longest else None
    lengths = torch.randint(0, length + 1, (batch,)) if padded else None
    layout = Layout(batch, length, segment_ids=documents, lengths=lengths)
    results = {}
    for backend in ("reference", "blocked"):
        outputs = run(inputs, backend=backend, layout=layout)
        results[backend] = (*outputs, *gradients(outputs, inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert (actual - expected).detach().abs().max() < 1e-10 * max(1.0, float(expected.detach().abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 7])
def test_gradcheck(form: str, length: int) -> None:
    inputs = scan_inputs(form, 2, length)
    names = list(inputs)
    documents = segments(2, length, 4)
    for backend in ("blocked", "reference"):

        def call(*values: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
            return run(dict(zip(names, values, strict=True)), segment_ids=documents, backend=backend)

        assert gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("form", FORMS)
def test_long_rows_go_by_spans(form: str) -> None:
    length = SPAN + CHUNK + 3
    inputs = scan_inputs(form, 1, length)
    documents = segments(1, length, 700)
    results = {}
    for backend in ("reference", "blocked"):
        outputs = run(inputs, backend=backend, segment_ids=documents)
        results[backend] = (*outputs, *gradients(outputs, inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert relative(actual, expected) < 1e-10
    with torch.no_grad():
        assert all(map(torch.equal, run(inputs, segment_ids=documents), results["blocked"][:2]))


@pytest.mark.parametrize("form", FORMS)
def test_pieces_equal_the_whole_with_gradients(form: str) -> None:
    inputs = scan_inputs(form, 2, 90)
    whole = run(inputs)
    state, outputs = inputs["initial_state"], []
    for start, stop in ((0, 1), (1, 40), (40, 41), (41, 90)):
        piece = {n: v[:, start:stop] if n in ("x", "dt", "b", "c") else v for n, v in inputs.items()}
        y, state = run({**piece, "initial_state": state})
        outputs.append(y)
    pieces = (torch.cat(outputs, dim=1), state)
    assert all(relative(p, w) < 1e-11 for p, w in zip(pieces, whole, strict=True))
    expected, found = gradients(whole, inputs), gradients(pieces, inputs)
    assert all(relative(found[name], expected[name]) < 1e-10 for name in inputs)


@pytest.mark.parametrize("form", FORMS)
def test_strong_decays_neither_overflow_nor_spoil_what_follows(form: str) -> None:
    """Published chunk kernels give NaN gradients here; a running sum in float32 would lose four digits."""
    inputs = scan_inputs(form, 1, 128, torch.float32)
    with torch.no_grad():
        inputs["dt"][:, 5:20] *= 100
        inputs["dt"][:, 20:] *= 0.01
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    outputs, expected = run(inputs), run(wide, backend="reference")
    for actual, exact in zip(outputs, expected, strict=True):
        assert relative(actual.double(), exact) < 1e-5
    found, exact_gradients = gradients(outputs, inputs), gradients_like(expected, outputs, wide)
    for name in inputs:
        assert torch.isfinite(found[name]).all() and relative(found[name].double(), exact_gradients[name]) < 1e-4


@pytest.mark.skipif(compiled.missing() is not None, reason=f"no kernels: {compiled.missing()}")
@pytest.mark.parametrize("form", ["heads", "discrete"])
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([2, 9, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 9]),
    longest=st.sampled_from([0, 5, 90]),
    padded=st.booleans(),
    part=st.booleans(),
)
def test_compiled_equals_definition(form: str, batch: int, length: int, longest: int, padded: bool, part: bool) -> None:
    inputs = scan_inputs(form, batch, length, torch.float32)
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    if part:  # of a wider tensor, as a layer's is
        x = torch.cat([inputs["x"].detach().flatten(-2), torch.zeros(batch, length, 5)], -1)[..., :-5]
        inputs["x"] = x.unflatten(-1, inputs["x"].shape[-2:]).requires_grad_()
    documents = segments(batch, length, longest) if longest else None
    lengths = torch.randint(0, length + 1, (batch,)) if padded else None
    layout = Layout(batch, length, segment_ids=documents, lengths=lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["megalodon.ops.selective_scan.scalar"], "CACHEFUL", 12 * CHUNK * 2)  # short spans
        outputs = run(inputs, backend="numba", layout=layout)
        found = gradients(outputs, inputs)
    expected = run(wide, backend="reference", layout=layout)
    exact = gradients_like(expected, outputs, wide)
    for actual, right in zip(outputs, expected, strict=True):
        assert relative(actual.double(), right) < 1e-5
    for name, gradient in found.items():
        assert relative(gradient.double(), exact[name]) < 1e-4, name


def gradients_like(outputs: tuple[Tensor, ...], narrow: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict:
    """`gradients` with the weighting that outputs of a narrower dtype would get."""
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, dtype=o.dtype, generator=generator).double() for o in narrow]
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), upstream), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_input_keeps_a_float32_state(form: str) -> None:
    inputs = {k: v.detach() for k, v in scan_inputs(form, 1, 200, torch.float32).items()}
    y, state = run({**inputs, "x": inputs["x"].bfloat16()})
    expected, expected_state = run({**inputs, "x": inputs["x"].bfloat16().float()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative(y.float(), expected) < 2**-7 and relative(state, expected_state) < 1e-6


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("channels", {"x": torch.zeros(2, 5)}, "x is"),
        ("channels", {"dt": torch.zeros(2, 5, 3)}, "dt has shape"),
        ("channels", {"a": None}, "a is None"),
        ("channels", {"b": torch.zeros(2, 5, 4), "c": torch.zeros(2, 5, 4)}, "b has shape"),
        ("heads", {"b": torch.zeros(2, 5, 3, 5), "c": torch.zeros(2, 5, 3, 5)}, "divisor of 4 heads"),
        ("heads", {"c": torch.zeros(2, 5, 2, 4)}, "c has shape"),
        ("heads", {"a": torch.zeros(3)}, "a has shape"),
        ("heads", {"skip": torch.zeros(3)}, "skip"),
        ("heads", {"initial_state": torch.zeros(2, 4, 3, 4)}, "initial_state"),
        ("heads", {"segment_ids": torch.zeros(2, 4)}, "segment_ids"),
        ("heads", {"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_input_names_the_argument(form: str, change: dict, message: str) -> None:
    inputs = {k: v.detach() for k, v in scan_inputs(form, 2, 5).items()}
    with pytest.raises(ValueError, match=message):
        run({**inputs, **change})


def test_golden(shared) -> None:
    from safetensors.torch import load_file

    golden = load_file(shared / "golden/kin/mamba.safetensors")
    op = {k[3:]: v for k, v in golden.items() if k.startswith("op.")}
    names = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = {name: op[name].clone().requires_grad_() for name in names}
    dt = torch.nn.functional.softplus(leaves["delta"] + leaves["delta_bias"][:, None])
    y, state = selective_scan(leaves["x"].mT, dt.mT, leaves["A"], leaves["B"].mT, leaves["C"].mT, leaves["D"])
    gated = y.mT * torch.nn.functional.silu(leaves["z"])
    assert relative(gated, op["y"]) < 1e-6 and relative(state, op["last_state"]) < 1e-6
    gated.backward(op["dy"])
    assert all(relative(leaves[name].grad, op[f"grad.{name}"]) < 1e-5 for name in names)


def test_golden_mamba2(shared) -> None:
    from safetensors.torch import load_file

    golden = load_file(shared / "golden/kin/mamba2.safetensors")
    op = {k[3:]: v for k, v in golden.items() if k.startswith("op.")}
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    leaves = {name: op[name].clone().requires_grad_() for name in names}
    dt = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    arguments = (leaves["x"], dt, leaves["A"], leaves["B"], leaves["C"], leaves["D"])
    y, state = selective_scan(*arguments)
    assert relative(y, op["y"]) < 1e-6 and relative(state, op["last_state"]) < 1e-6
    y.backward(op["dy"], retain_graph=True)
    assert all(relative(leaves[name].grad, op[f"grad.{name}"]) < 1e-5 for name in names)
    packed, _ = selective_scan(*arguments, segment_ids=op["packed_ids"])
    assert relative(packed, op["packed_y"]) < 1e-6
