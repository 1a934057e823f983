"""CEMA's kernels against the definition in float64: odd shapes, states, packings, dtypes; and as PyTorch operators."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICES, OPCHECKS, largest_error, narrow, poisoned_and_fresh, widen  # noqa: F401
from operator_cases import cema_inputs, relative, segments

from megalodon.ops import Layout, cema

ACTIVATIONS = ("x",)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, so that states pass between them at small sizes."""
    from megalodon.ops.cema import triton

    monkeypatch.setattr(triton, "SHORTEST", 16)


def inputs_of(device: str, dtype: torch.dtype, state: bool, *sizes: int) -> dict[str, torch.Tensor]:
    values = cema_inputs(*sizes)
    if not state:
        del values["initial_state"]
    return narrow(values, device, dtype, ACTIVATIONS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "length", "dim", "components", "longest", "state", "programs"),
    [
        (2, 70, 3, 2, 0, True, 64),
        (1, 16, 5, 3, 0, False, 1),
        (1, 1, 4, 2, 0, True, 1),
        (3, 53, 10, 16, 20, True, 3),
        (2, 33, 4, 2, 5, False, 64),
        (1, 40, 3, 17, 0, True, 2),
    ],
)
def test_float32(device, batch, length, dim, components, longest, state, programs, monkeypatch) -> None:
    from megalodon.ops.cema import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    inputs = inputs_of(device, torch.float32, state, batch, length, dim, components)
    documents = segments(batch, length, longest) if longest else None
    wide = widen(inputs)
    errors = largest_error(
        cema(**inputs, segment_ids=documents, backend="triton"),
        cema(**wide, segment_ids=documents, backend="reference"),
        inputs,
        wide,
    )
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_rounds_only_what_it_reads_and_writes(device: str) -> None:
    inputs = inputs_of(device, torch.bfloat16, True, 2, 50, 4, 3)
    wide = widen(inputs)
    outputs = cema(**inputs, backend="triton")
    assert outputs[0].dtype == torch.bfloat16 and outputs[1].dtype == torch.complex64
    errors = largest_error(outputs, cema(**wide, backend="reference"), inputs, wide)
    assert errors["output 1"] < 3e-5, "the state must not be rounded to bfloat16"
    assert max(errors.values()) < 2**-7, errors


@pytest.mark.parametrize("device", DEVICES)
def test_padding_gives_zeros_and_leaves_the_state_alone(device: str) -> None:
    inputs = inputs_of(device, torch.float32, True, 3, 40, 2, 3)
    wide = widen(inputs)
    lengths = [40, 17, 0]
    outputs = cema(**inputs, layout=Layout(3, 40, device, lengths=lengths), backend="triton")
    expected = cema(**wide, layout=Layout(3, 40, lengths=lengths), backend="reference")
    errors = largest_error(outputs, expected, inputs, wide)
    assert max(errors.values()) < 1e-5, errors
    assert not outputs[0][1, 17:].any() and not outputs[0][2].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_document_does_not_see_the_one_before_it(device: str) -> None:
    inputs = {k: v.detach() for k, v in inputs_of(device, torch.float32, True, 1, 40, 2, 2).items()}
    documents = torch.tensor([[0] * 13 + [1] * 27])
    expected = cema(**inputs, segment_ids=documents, backend="triton")
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, :13] = torch.nan
    y, state = cema(**inputs, segment_ids=documents, backend="triton")
    assert torch.equal(y[:, 13:], expected[0][:, 13:]) and torch.equal(state, expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_one_output_alone_has_gradients(device: str) -> None:
    for which in (0, 1):
        inputs = inputs_of(device, torch.float32, True, 1, 20, 2, 2)
        wide = widen(inputs)
        outputs = (cema(**inputs, backend="triton")[which],)
        errors = largest_error(outputs, (cema(**wide, backend="reference")[which],), inputs, wide)
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_input_weights_of_zero_and_slow_decay(device: str) -> None:
    inputs = inputs_of(device, torch.float32, True, 1, 48, 2, 2)
    with torch.no_grad():
        inputs["p"][:, 0] = 0
        inputs["q"][0] = torch.tensor(0.99999 + 0.001j)
        inputs["q"][1] = torch.tensor(1e-30 + 0j)
    wide = widen(inputs)
    errors = largest_error(cema(**inputs, backend="triton"), cema(**wide, backend="reference"), inputs, wide)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_without_gradients_is_the_recurrence(device: str) -> None:
    inputs = {k: v.detach() for k, v in inputs_of(device, torch.float32, True, 3, 1, 5, 3).items()}
    outputs = cema(**inputs, backend="triton")
    for actual, expected in zip(outputs, cema(**widen(inputs), backend="reference"), strict=True):
        assert relative(actual.to("cpu", expected.dtype), expected) < 3e-6


@pytest.mark.parametrize("device", DEVICES)
def test_strided_input_is_handled(device: str) -> None:
    inputs = {k: v.detach() for k, v in inputs_of(device, torch.float32, False, 2, 20, 3, 2).items()}
    expected = cema(**inputs, backend="triton")[0]
    inputs["x"] = inputs["x"].mT.contiguous().mT
    inputs["q"] = inputs["q"].conj().resolve_conj().conj()
    assert torch.equal(cema(**inputs, backend="triton")[0], expected)


@pytest.mark.parametrize("utilities", OPCHECKS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_operators_pass_opcheck(device: str, packed: bool, utilities: tuple[str, ...]) -> None:
    from megalodon.ops.cema import triton
    from megalodon.ops.pieces import pieces_of

    values = inputs_of(device, torch.float32, True, 2, 20, 2, 2)
    real = {k: torch.view_as_real(v.detach()).contiguous() if v.is_complex() else v.detach() for k, v in values.items()}
    real = {k: v.requires_grad_() for k, v in real.items()}
    tables: tuple = (None, None, None, False)
    if packed:
        pieces = pieces_of(Layout(2, 20, device, segment_ids=segments(2, 20, 7)), 16, triton.BLOCK)
        tables = (pieces.runs, pieces.rows, pieces.order, False)
    arguments = (real["x"], real["p"], real["q"], real["gamma"], real["omega"])
    torch.library.opcheck(triton.cema_op, (*arguments, real["initial_state"], *tables), test_utils=utilities)
    detached = tuple(a.detach() for a in arguments)
    y, last, entering = triton.cema_op(*detached, real["initial_state"].detach(), *tables)
    backward = (torch.randn_like(y), torch.randn_like(last), *detached, entering, *tables)
    torch.library.opcheck(triton.cema_backward_op, backward, test_utils=utilities)
    one = (real["x"].detach()[:, :1].contiguous(), *detached[1:], real["initial_state"].detach())
    torch.library.opcheck(triton.cema_step_op, one, test_utils=utilities)


def test_compiles_without_graph_breaks() -> None:
    inputs = inputs_of("cpu", torch.float32, True, 2, 20, 2, 2)
    x = inputs.pop("x")

    def run(x: torch.Tensor) -> torch.Tensor:
        return cema(x, **inputs, backend="triton")[0].sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, run(x))
    (actual,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (compiled, run(x)))
    assert torch.equal(actual, expected)
