"""TimestepNorm's kernels against the definition in float64: states, priors, padding, packings, groups, long streams."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICES, OPCHECKS, largest_error, narrow, poisoned_and_fresh, widen  # noqa: F401
from operator_cases import segments
from torch import Tensor

from megalodon.ops import Layout, Prior, timestep_norm


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and pieces at small sizes."""
    from megalodon.ops.timestep_norm import triton

    monkeypatch.setattr(triton, "SHORTEST", 8)
    monkeypatch.setattr(triton, "TILE", 64)


def run(
    inputs: dict[str, Tensor], groups: int, backend: str, count: Tensor | None = None, prior_count: int = 0, **others
):
    """(y, mean, var), with gradients, and the count."""
    values = dict(inputs)
    prior = None
    if "prior_mean" in values:
        prior = Prior(prior_count, values.pop("prior_mean"), values.pop("prior_var"))
    device = values["x"].device
    count = None if count is None else count.to(device)
    mask = others.pop("mask", None)
    y, count, mean, var = timestep_norm(
        **values,
        num_groups=groups,
        count=count,
        padding_mask=None if mask is None else mask.to(device),
        prior=prior,
        backend=backend,
        **others,
    )
    return (y, mean, var), count.cpu()


def inputs_of(
    device: str, dtype: torch.dtype, batch: int, length: int, dim: int, groups: int, state: bool, prior: bool
):
    apart = 3.0 * (torch.arange(dim) % 2)  # channels of a group that lie close magnify rounding by 1 / std
    x = torch.randn(batch, length, dim).clamp(-1, 1) + apart
    values = {"x": x, "weight": torch.randn(dim), "bias": torch.randn(dim)}
    if state:
        values |= {"mean": torch.randn(batch, groups), "var": torch.rand(batch, groups) + 0.1}
    if prior:
        values |= {"prior_mean": torch.randn(groups), "prior_var": torch.rand(groups) + 0.1}
    return narrow(values, device, dtype, ("x",))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "length", "dim", "groups", "longest", "state", "masked", "prior_count", "programs"),
    [
        (2, 30, 12, 3, 0, True, False, 0, 2),
        (1, 16, 8, 8, 0, False, False, 3, 1),
        (3, 25, 10, 5, 7, True, True, 2, 64),
        (2, 21, 6, 1, 5, False, False, 2, 64),
        (2, 40, 6, 3, 0, False, True, 0, 64),
        (2, 40, 6, 3, 0, True, True, 0, 64),
        (1, 1, 6, 2, 0, True, False, 0, 1),
    ],
)
def test_float32(
    device, batch, length, dim, groups, longest, state, masked, prior_count, programs, monkeypatch
) -> None:
    from megalodon.ops.timestep_norm import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    inputs = inputs_of(device, torch.float32, batch, length, dim, groups, state, prior_count > 0)
    others: dict = {"prior_count": prior_count, "segment_ids": segments(batch, length, longest) if longest else None}
    if state:
        others["count"] = torch.randint(0, 9, (batch,))
    if masked:
        others["mask"] = torch.rand(batch, length) < 0.3
        others["mask"][0] = True  # a row that says nothing
    wide = widen(inputs)
    actual, count = run(inputs, groups, "triton", **others)
    expected, expected_count = run(wide, groups, "reference", **others)
    assert torch.equal(count, expected_count)
    errors = largest_error(actual, expected, inputs, wide)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_keeps_float32_statistics(device: str) -> None:
    inputs = inputs_of(device, torch.bfloat16, 2, 33, 12, 3, False, False)
    wide = widen(inputs)
    actual, _ = run(inputs, 3, "triton")
    expected, _ = run(wide, 3, "reference")
    errors = largest_error(actual, expected, inputs, wide)
    assert errors["output 1"] < 3e-6 and errors["output 2"] < 3e-6
    assert max(errors.values()) < 2**-7, errors


@pytest.mark.parametrize("device", DEVICES)
def test_padded_and_empty_rows(device: str) -> None:
    inputs = inputs_of(device, torch.float32, 3, 20, 6, 2, True, False)
    wide = widen(inputs)
    lengths, count = [20, 7, 0], torch.tensor([3, 0, 5])
    actual, seen = run(inputs, 2, "triton", count, layout=Layout(3, 20, device, lengths=lengths))
    expected, expected_seen = run(wide, 2, "reference", count, layout=Layout(3, 20, lengths=lengths))
    assert torch.equal(seen, expected_seen)
    errors = largest_error(actual, expected, inputs, wide)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_a_document_does_not_see_the_one_before_it(device: str) -> None:
    x = torch.randn(1, 30, 4, device=device)
    documents = torch.tensor([[0] * 11 + [1] * 19])
    expected, _, mean, _ = timestep_norm(x, None, None, 2, segment_ids=documents, backend="triton")
    x[:, :11] = torch.nan
    y, _, new_mean, _ = timestep_norm(x, None, None, 2, segment_ids=documents, backend="triton")
    assert torch.equal(y[:, 11:], expected[:, 11:]) and torch.equal(new_mean, mean)


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_after_millions_of_tokens(device: str) -> None:
    """A mean far from zero and a count of ten million: float32 sums would stand still.

    The statistics' movements are sums of deviations of either sign, so rounding is measured beside their sizes' sum.
    """
    count = torch.tensor([10_000_000])
    mean, var = torch.full((1, 1), 100.0, dtype=torch.float64), torch.full((1, 1), 0.01, dtype=torch.float64)
    x = 100 + 0.1 * torch.randn(1, 40, 4)
    _, _, new_mean, new_var = timestep_norm(
        x.to(device), None, None, 1, count.to(device), mean.to(device), var.to(device), backend="triton"
    )
    _, _, right_mean, right_var = timestep_norm(x.double(), None, None, 1, count, mean, var, backend="reference")
    deviations = (x.double() - mean).abs().mean(-1).sum(-1, keepdim=True) / count
    assert ((new_mean.cpu() - right_mean).abs() < 1e-4 * deviations).all()
    deviations = (x.double().var(-1, correction=0) - var).abs().sum(-1, keepdim=True) / count
    assert ((new_var.cpu() - right_var).abs() < 1e-3 * deviations).all()


@pytest.mark.parametrize("utilities", OPCHECKS)
@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str, utilities: tuple[str, ...]) -> None:
    from megalodon.ops.pieces import pieces_of
    from megalodon.ops.timestep_norm import triton

    values = inputs_of(device, torch.float32, 2, 20, 6, 2, True, False)
    statistics = [values[name].detach().double().requires_grad_() for name in ("mean", "var")]
    priors = [torch.rand(2, dtype=torch.float64, device=device) for _ in range(2)]
    pieces = pieces_of(Layout(2, 20, device, segment_ids=segments(2, 20, 7)), 8, 1)
    for tables in ((None, None, False), (pieces.runs, pieces.rows, pieces.chained)):
        count = torch.tensor([3, 0], device=device)
        arguments = (values["x"], values["weight"], values["bias"], count, *statistics, 1, *priors, None, *tables, 1e-5)
        torch.library.opcheck(triton.timestep_norm_op, arguments, test_utils=utilities)
        with torch.no_grad():
            y, *saved = triton.timestep_norm_op(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
        backward = (torch.randn_like(y), torch.randn_like(saved[-1]), values["x"].detach(), values["weight"].detach())
        torch.library.opcheck(
            triton.timestep_norm_backward_op, (*backward, None, *saved, 1, *tables), test_utils=utilities
        )


def test_compiles_without_graph_breaks() -> None:
    x = torch.randn(2, 20, 6, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return timestep_norm(x, None, None, 3, backend="triton")[0].sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, run(x))
    (actual,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (compiled, run(x)))
    assert torch.equal(actual, expected)
