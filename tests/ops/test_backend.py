"""The choice of a back end: precedence, and messages that say what is wrong."""

from __future__ import annotations

import pytest
import torch

from megalodon import ops
from megalodon.ops import ENVIRONMENT_VARIABLE, causal_attention, cema, chunk_attention, compiled, timestep_norm
from megalodon.ops import backend as backends


def test_kernels_for_a_gpu_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert backends.default_backend(torch.device("cuda"), torch.bfloat16) == "blocked"


def test_compiled_loops_that_cannot_be_had_say_why_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 4)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(compiled, "_MISSING", "Numba is not installed")
    timestep_norm(x, None, None, 2)
    with pytest.raises(ValueError, match="backend='numba' cannot run here: Numba is not installed; 'blocked' runs"):
        timestep_norm(x, None, None, 2, backend="numba")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "numba")
    with pytest.raises(ValueError, match="MEGALODON_BACKEND='numba'"):
        timestep_norm(x, None, None, 2)


def test_operators_without_compiled_loops_take_the_blocked_form() -> None:
    for chosen, available in ops.backends("cpu").values():
        assert chosen in available
    q = torch.randn(1, 5, 2, 4)
    expected = chunk_attention(q, q, q, 4, backend="blocked")
    assert torch.equal(chunk_attention(q, q, q, 4), expected)


def test_the_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    x = torch.randn(1, 3, 4)
    timestep_norm(x, None, None, 2, backend="reference")
    with pytest.raises(ValueError, match="MEGALODON_BACKEND='nonsense'"):
        timestep_norm(x, None, None, 2)


def test_kernels_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 4)
    monkeypatch.setattr(backends, "TRITON_VERSION", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        timestep_norm(x, None, None, 2, backend="triton")
    monkeypatch.setattr(backends, "TRITON_VERSION", "3.4.0")
    with pytest.raises(ValueError, match=r"Triton 3\.4\.0 is too old: they need 3\.5"):
        timestep_norm(x, None, None, 2, backend="triton")
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        timestep_norm(x, None, None, 2, backend="triton")
    monkeypatch.setattr(backends, "without_kernels", lambda *_: None)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        timestep_norm(x.double(), None, None, 2, backend="triton")


def test_work_on_another_device_asks_for_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(KeyError), backends.default_backends():
        timestep_norm(torch.randn(1, 3, 4), None, None, 2)
        raise KeyError
    with pytest.raises(ValueError, match="nonsense"):
        timestep_norm(torch.randn(1, 3, 4), None, None, 2)


def test_tensors_on_different_devices_are_named() -> None:
    x, p = torch.randn(1, 3, 4), torch.rand(4, 2)
    q = torch.zeros(4, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="gamma is on meta: the activations are on cpu"):
        cema(x, p, q, q.to("meta"))
    with pytest.raises(ValueError, match="bias is on meta"):
        timestep_norm(x, None, torch.zeros(4, device="meta"), 2)
    heads = torch.randn(1, 3, 2, 4)
    with pytest.raises(ValueError, match="v is on meta"):
        chunk_attention(heads, heads, heads.to("meta"), 2)
    with pytest.raises(ValueError, match="offset is on meta"):
        causal_attention(heads[:, :1], heads, heads, torch.zeros(1, dtype=torch.int64, device="meta"))
