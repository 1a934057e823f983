"""Gecko's operators against what its authors' kernels computed in float64, stored in float32.

In float64 the storage's rounding is all that may differ; in float32 outputs agree to 1e-5, gradients to 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from operator_cases import relative
from safetensors import safe_open
from torch import Tensor

from megalodon import ops

with safe_open(Path(__file__).parent.parent / "golden" / "gecko" / "ops.safetensors", "pt") as file:
    META = json.loads(file.metadata()["meta"])
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

STORED = 1.2e-7
LIMITS = {torch.float64: (STORED, STORED), torch.float32: (1e-5, 1e-4)}

everywhere = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("blocked", torch.float64), ("blocked", torch.float32)],
)


def leaf(name: str, dtype: torch.dtype) -> Tensor:
    return TENSORS[name].to(dtype).requires_grad_()


def check(name: str, outputs: dict[str, Tensor], inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients by the golden's own names."""
    forward, backward = LIMITS[dtype]
    for key, value in outputs.items():
        assert relative(value.double(), TENSORS[name + key].double()) < forward, key
    upstream = [TENSORS[f"{name}d{key}"].to(dtype) for key in outputs]
    found = torch.autograd.grad(list(outputs.values()), list(inputs.values()), upstream, allow_unused=True)
    for key, gradient in zip(inputs, found, strict=True):
        expected = TENSORS[f"{name}d{key}"].double()
        gradient = torch.zeros_like(expected) if gradient is None else gradient.double()
        assert relative(gradient, expected) < backward or (gradient - expected).abs().max() < 1e-12, key


@everywhere
@pytest.mark.parametrize("case", ["plain", "cont", "bos", "pad", "padbos", "long"])
def test_timestep_decay_norm(case: str, backend: str, dtype: torch.dtype) -> None:
    name = f"timestep_decay_norm.{case}."
    inputs = {key: leaf(name + key, dtype) for key in ("x", "weight", "bias", "mean", "var")}
    y, count, mean, var = ops.timestep_decay_norm(
        **inputs,
        num_groups=META["num_groups"],
        beta1=META["beta1"],
        beta2=META["beta2"],
        count=TENSORS[name + "count"],
        padding_mask=TENSORS.get(name + "padding_mask"),
        bos_mask=TENSORS.get(name + "bos_mask"),
        eps=META["eps"],
        backend=backend,
    )
    assert torch.equal(count, TENSORS[name + "count_out"])
    check(name, {"y": y, "mean_out": mean, "var_out": var}, inputs, dtype)


@everywhere
@pytest.mark.parametrize("case", ["plain", "cont", "one", "bos", "long"])
def test_cema(case: str, backend: str, dtype: torch.dtype) -> None:
    name = f"cema.{case}."
    inputs = {key: leaf(name + key, dtype) for key in ("x", "p", "q", "gamma", "h") if name + key in TENSORS}
    q, gamma = (torch.view_as_complex(inputs[key]) for key in ("q", "gamma"))
    initial = torch.view_as_complex(inputs["h"]) if "h" in inputs else None
    bos = TENSORS.get(name + "bos_mask")
    y, h = ops.cema(inputs["x"].mT, inputs["p"], q, gamma, None, initial, bos_mask=bos, backend=backend)
    check(name, {"y": y.mT, "h_out": torch.view_as_real(h)}, inputs, dtype)


@everywhere
@pytest.mark.parametrize("case", ["plain", "cont", "seg", "segcont"])
def test_sliding_chunk_attention(case: str, backend: str, dtype: torch.dtype) -> None:
    name = f"sliding_chunk_attention.{case}."
    inputs = {key: leaf(name + key, dtype) for key in ("q", "k", "v", "prev_k", "prev_v") if name + key in TENSORS}
    renamed = {key.replace("prev", "before"): value for key, value in inputs.items()}
    bos, places = segments_of(name)
    y = ops.sliding_chunk_attention(
        **renamed, chunk_size=META["chunk_size"], bos_mask=bos, bos_places=places, backend=backend
    )
    check(name, {"y": y}, inputs, dtype)


@everywhere
@pytest.mark.parametrize("case", ["plain", "cont", "seg", "segcont"])
def test_working_memory(case: str, backend: str, dtype: torch.dtype) -> None:
    name = f"adaptive_working_memory.{case}."
    keys = ("q", "k", "v", "memory", "log_norm", "prev_k", "prev_v")
    inputs = {key: leaf(name + key, dtype) for key in keys if name + key in TENSORS}
    ours = {key.replace("prev", "before"): x if "m" in key else x.transpose(1, 2) for key, x in inputs.items()}
    if "log_norm" in ours:
        ours["log_mass"] = ours.pop("log_norm")
    bos, places = segments_of(name)
    y, memory, mass = ops.working_memory(
        **ours, chunk_size=META["chunk_size"], bos_mask=bos, bos_places=places, backend=backend
    )
    check(name, {"y": y.transpose(1, 2), "memory_out": memory, "log_norm_out": mass}, inputs, dtype)


def segments_of(name: str) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """BOS flags, and the last place of one in the chunk before, from the golden's numbers of segments."""
    if name + "segment_idx" not in TENSORS:
        return None, None
    numbers, earlier = TENSORS[name + "segment_idx"], TENSORS.get(name + "prev_segment_idx")
    if earlier is None:
        return numbers.diff(dim=1, prepend=torch.zeros_like(numbers[:, :1])) > 0, None
    ahead = TENSORS.get(name + "prev_segment_count")
    ahead = earlier[:, :1] if ahead is None else ahead[:, None]
    flags = torch.cat([ahead, earlier, numbers], dim=1).diff(dim=1) > 0
    before, bos = flags.split([earlier.shape[1], numbers.shape[1]], dim=1)
    index = torch.arange(before.shape[1])
    return bos, (torch.where(before, index, -1).amax(1), torch.full((len(bos),), -1))
