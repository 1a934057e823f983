"""TimestepDecayNorm's kernels against the definition in float64: states, restarts, padding, groups, long streams."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICES, OPCHECKS, largest_error, narrow, poisoned_and_fresh, widen  # noqa: F401
from operator_cases import segments
from torch import Tensor

from megalodon.ops import Layout, timestep_decay_norm


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and pieces at small sizes."""
    from megalodon.ops.timestep_norm import triton

    monkeypatch.setattr(triton, "SHORTEST", 8)
    monkeypatch.setattr(triton, "TILE", 64)
    monkeypatch.setattr(triton, "PROGRAMS", 64)


def run(inputs: dict[str, Tensor], groups: int, backend: str, **others):
    """(y, mean, var), with gradients, and the count."""
    device = inputs["x"].device
    others = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in others.items()}
    y, count, mean, var = timestep_decay_norm(**inputs, num_groups=groups, backend=backend, **others)
    return (y, mean, var), count.cpu()


def inputs_of(device: str, dtype: torch.dtype, batch: int, length: int, dim: int, groups: int, state: bool):
    apart = 3.0 * (torch.arange(dim) % 2)  # channels of a group that lie close magnify rounding by 1 / std
    x = torch.randn(batch, length, dim).clamp(-1, 1) + apart
    values = {"x": x, "weight": torch.randn(dim), "bias": torch.randn(dim)}
    if state:
        values |= {"mean": torch.randn(batch, groups), "var": torch.rand(batch, groups) + 0.1}
    return narrow(values, device, dtype, ("x",))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "length", "dim", "groups", "longest", "state", "masked", "bos", "betas", "programs"),
    [
        (2, 30, 12, 3, 0, True, False, False, (0.9, 0.97), 2),
        (1, 16, 8, 4, 0, False, False, False, (0.999, 0.9999), 1),
        (2, 17, 8, 4, 7, True, True, False, (0.9, 0.95), 64),
        (2, 21, 6, 1, 5, False, False, True, (0.3, 0.05), 64),
        (2, 25, 6, 2, 0, False, True, True, (0.999, 0.9999), 64),
        (2, 25, 6, 2, 0, True, True, True, (0.9, 0.97), 2),
        (1, 1, 6, 2, 0, True, False, False, (0.999, 0.9999), 1),
    ],
)
def test_float32(device, batch, length, dim, groups, longest, state, masked, bos, betas, programs, monkeypatch) -> None:
    from megalodon.ops.timestep_norm import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    inputs = inputs_of(device, torch.float32, batch, length, dim, groups, state)
    others: dict = {"beta1": betas[0], "beta2": betas[1]}
    others["segment_ids"] = segments(batch, length, longest) if longest else None
    if state:
        others["count"] = torch.randint(1, 9, (batch,))
    if masked:
        others["padding_mask"] = torch.rand(batch, length) < 0.3
        others["padding_mask"][0] = True  # a row that says nothing
    if bos:
        others["bos_mask"] = torch.rand(batch, length) < 0.1
    wide = widen(inputs)
    actual, count = run(inputs, groups, "triton", **others)
    expected, expected_count = run(wide, groups, "reference", **others)
    assert torch.equal(count, expected_count)
    errors = largest_error(actual, expected, inputs, wide)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_the_correction_does_not_cancel(device: str) -> None:
    """First tokens with the usual betas: float32 corrections are off by 8e-5, and a beta in float32 by 2e-4."""
    inputs = inputs_of(device, torch.float32, 2, 20, 6, 2, False)
    wide = widen(inputs)
    actual, _ = run(inputs, 2, "triton")
    expected, _ = run(wide, 2, "reference")
    errors = largest_error(actual, expected, inputs, wide)
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_keeps_float32_statistics(device: str) -> None:
    inputs = inputs_of(device, torch.bfloat16, 1, 21, 12, 3, False)
    wide = widen(inputs)
    actual, _ = run(inputs, 3, "triton", beta1=0.9, beta2=0.97)
    expected, _ = run(wide, 3, "reference", beta1=0.9, beta2=0.97)
    errors = largest_error(actual, expected, inputs, wide)
    assert errors["output 1"] < 3e-6 and errors["output 2"] < 3e-6
    assert max(errors.values()) < 2**-7, errors


@pytest.mark.parametrize("device", DEVICES)
def test_padded_and_empty_rows(device: str) -> None:
    inputs = inputs_of(device, torch.float32, 3, 20, 6, 2, True)
    wide = widen(inputs)
    lengths, count = [20, 7, 0], torch.tensor([3, 1, 5])
    actual, seen = run(inputs, 2, "triton", count=count, layout=Layout(3, 20, device, lengths=lengths))
    expected, expected_seen = run(wide, 2, "reference", count=count, layout=Layout(3, 20, lengths=lengths))
    assert torch.equal(seen, expected_seen)
    errors = largest_error(actual, expected, inputs, wide)
    assert max(errors.values()) < 1e-5, errors
    assert not actual[0][1, 7:].any() and not actual[0][2].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by", ["segment_ids", "bos_mask"])
def test_nothing_passes_a_restart(device: str, by: str) -> None:
    x = torch.randn(1, 18, 4, device=device)
    starts = torch.zeros(1, 18, dtype=torch.bool, device=device)
    starts[:, 11] = True
    cut = {by: starts if by == "bos_mask" else starts.cumsum(1)}
    expected, _, mean, var = timestep_decay_norm(x, None, None, 2, **cut, backend="triton")
    x[:, :11] = torch.nan
    y, _, new_mean, new_var = timestep_decay_norm(x, None, None, 2, **cut, backend="triton")
    assert torch.equal(y[:, 11:], expected[:, 11:])
    assert torch.equal(new_mean, mean) and torch.equal(new_var, var)
    leaf = torch.randn(1, 18, 4, device=device, requires_grad=True)
    weighting = torch.ones(1, 18, 4, device=device)
    weighting[:, 11:] = torch.nan
    (grad,) = torch.autograd.grad(timestep_decay_norm(leaf, None, None, 2, **cut, backend="triton")[0], leaf, weighting)
    assert torch.isfinite(grad[:, :11]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_equal_the_whole(device: str) -> None:
    x = torch.randn(1, 17, 4, device=device)
    bos = torch.rand(1, 17, device=device) < 0.1
    whole = timestep_decay_norm(x, None, None, 2, bos_mask=bos, backend="triton")
    state, outputs = (), []
    for begin, end in ((0, 1), (1, 9), (9, 17)):
        carried = dict(zip(("count", "mean", "var"), state, strict=False))
        part = {"bos_mask": bos[:, begin:end], "backend": "triton"}
        y, *state = timestep_decay_norm(x[:, begin:end], None, None, 2, **carried, **part)
        state = (state[0], *(value.double() for value in state[1:]))
        outputs.append(y)
    assert torch.equal(state[0], whole[1])
    assert (torch.cat(outputs, 1) - whole[0]).abs().max() < 1e-5
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(state[1:], whole[2:], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_after_millions_of_tokens(device: str) -> None:
    """A variance that moves by a ten-thousandth of what is new: a float32 sum would move it wrongly."""
    count = torch.tensor([10_000_000])
    mean, var = torch.full((1, 1), 100.0, dtype=torch.float64), torch.full((1, 1), 0.01, dtype=torch.float64)
    x = 100 + 0.1 * torch.randn(1, 40, 4)
    state = (value.to(device) for value in (count, mean, var))
    _, _, new_mean, new_var = timestep_decay_norm(x.to(device), None, None, 1, 0.999, 0.9999, *state, backend="triton")
    right = timestep_decay_norm(x.double(), None, None, 1, 0.999, 0.9999, count, mean, var, backend="reference")
    # the tokens' own means are float32's, to 4e-6, of which a thousandth counts; a float32 average is off by 4e-6
    assert ((new_mean.cpu() - right[2]).abs() < 4e-7).all()
    assert ((new_var.cpu() - right[3]).abs() < 1e-3 * (right[3] - var).abs().clamp_min(1e-6)).all()


@pytest.mark.parametrize("utilities", OPCHECKS)
@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str, utilities: tuple[str, ...]) -> None:
    from megalodon.ops.timestep_decay_norm import triton

    values = inputs_of(device, torch.float32, 1, 4, 4, 1, True)
    statistics = [values[name].detach().double().requires_grad_() for name in ("mean", "var")]
    masks = [torch.rand(1, 4, device=device) < 0.3 for _ in range(2)]
    for padding, restart in ((None, None), masks):
        count = torch.tensor([3], device=device)
        tensors = (values["x"], values["weight"], values["bias"], count, *statistics, padding, restart)
        torch.library.opcheck(triton.timestep_decay_norm_op, (*tensors, 0.9, 0.97, 1e-5), test_utils=utilities)
        with torch.no_grad():
            plain = (a.detach() if isinstance(a, Tensor) else a for a in tensors)
            y, *saved, last = triton.timestep_decay_norm_op(*plain, 0.9, 0.97, 1e-5)
        given = (torch.randn_like(y), torch.randn_like(last), values["x"].detach(), values["weight"].detach())
        torch.library.opcheck(
            triton.timestep_decay_norm_backward_op, (*given, padding, restart, *saved, 0.9, 0.97), test_utils=utilities
        )


def test_compiles_without_graph_breaks() -> None:
    x = torch.randn(1, 6, 6, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return timestep_decay_norm(x, None, None, 3, backend="triton")[0].sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, run(x))
    (actual,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (compiled, run(x)))
    assert torch.equal(actual, expected)
