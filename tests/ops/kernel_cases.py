"""How the kernels are tested: in Triton's interpreter on the CPU, and on a GPU where there is one (marked `gpu`).

`tests/conftest.py` asks for the interpreter: Triton decides when it is imported whether kernels are interpreted.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux only")

HAS_GPU = torch.cuda.is_available()

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled, not interpreted, here")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]),
]

OPCHECKS = [
    pytest.param(("test_schema", "test_autograd_registration", "test_faketensor"), id="eager"),
    pytest.param(("test_aot_dispatch_dynamic",), id="compiled", marks=pytest.mark.slow),
]
"""What `opcheck` looks at. The second takes ten times as long; a compiled call of each operator is tested beside it."""


@pytest.fixture(autouse=True)
def poisoned_and_fresh():
    """Memory that nobody wrote holds NaN, and inputs are new in every run; a failure shows the seed."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    print(f"seed {seed}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def narrow(
    values: dict[str, Tensor], device: str, dtype: torch.dtype, activations: tuple[str, ...]
) -> dict[str, Tensor]:
    """What the kernels get: activations in `dtype`, the rest in float32 or complex64, with gradients, on `device`."""
    made = {}
    for name, value in values.items():
        kept = torch.complex64 if value.is_complex() else dtype if name in activations else torch.float32
        made[name] = value.detach().to(device, kept).requires_grad_()
    return made


def widen(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64 on the CPU, for the definition."""
    made = {}
    for name, value in values.items():
        kept = torch.complex128 if value.is_complex() else torch.float64
        made[name] = value.detach().to("cpu", kept).requires_grad_()
    return made


def largest_error(
    kernels: tuple[Tensor, ...],
    definition: tuple[Tensor, ...],
    narrow_inputs: dict[str, Tensor],
    wide_inputs: dict[str, Tensor],
) -> dict[str, float]:
    """Relative errors of outputs and of the gradients of a random weighting of them."""
    upstream = [torch.randn(o.shape, dtype=o.dtype) for o in definition]
    pushed = [u.to(o.device, o.dtype) for u, o in zip(upstream, kernels, strict=True)]
    rounded = [p.to("cpu", u.dtype) for p, u in zip(pushed, upstream, strict=True)]
    expected = torch.autograd.grad(definition, list(wide_inputs.values()), rounded, allow_unused=True)
    actual = torch.autograd.grad(kernels, list(narrow_inputs.values()), pushed, allow_unused=True)
    errors = {f"output {i}": _error(a, e, 0.1) for i, (a, e) in enumerate(zip(kernels, definition, strict=True))}
    for name, a, e in zip(narrow_inputs, actual, expected, strict=True):
        if e is None:
            assert a is None or not a.any(), name
        else:
            errors[f"gradient of {name}"] = _error(a, e, 1.0)
    return errors


def _error(actual: Tensor | None, expected: Tensor, least: float) -> float:
    """The largest difference over the largest expected magnitude, or over `least`: inputs are of order 1, and random
    sums that cancel, few numbers as they are, must not be judged by what is left of them. Gradients are sums of more
    and larger terms than outputs, and in attention to one key those of q and k cancel to zero.
    """
    assert actual is not None
    assert actual.shape == expected.shape
    assert torch.isfinite(torch.view_as_real(actual) if actual.is_complex() else actual).all()
    difference = (actual.to("cpu", expected.dtype) - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(least))
