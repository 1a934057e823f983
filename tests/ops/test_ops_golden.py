"""Operators against what the authors' implementation computed: outputs to 1e-5, gradients to 1e-4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from operator_cases import relative
from safetensors import safe_open
from torch import Tensor

from megalodon import ops

with safe_open(Path(__file__).parent.parent / "golden" / "ops.safetensors", "pt") as file:
    CASES = json.loads(file.metadata()["meta"])["cases"]
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def complex_of(name: str) -> Tensor:
    return torch.view_as_complex(TENSORS[name].contiguous())


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("case", ["plain", "cont", "one", "odd"])
def test_cema(case: str, backend: str) -> None:
    name = f"cema.{case}."
    inputs = {"x": TENSORS[name + "x"].mT.contiguous(), "p": TENSORS[name + "p"].clone()}
    inputs |= {"q": complex_of(name + "q"), "gamma": complex_of(name + "gamma")}
    if name + "h0" in TENSORS:
        inputs["initial_state"] = complex_of(name + "h0")
    for value in inputs.values():
        value.requires_grad_()
    y, h = ops.cema(**inputs, backend=backend)
    assert relative(y.mT, TENSORS[name + "y"]) < 1e-5
    assert relative(h, complex_of(name + "h_last")) < 1e-5
    torch.autograd.backward([y, h], [TENSORS[name + "dy"].mT, complex_of(name + "dh_last")])
    assert relative(inputs["x"].grad.mT, TENSORS[name + "dx"]) < 1e-4
    assert relative(inputs["p"].grad, TENSORS[name + "dp"]) < 1e-4
    for ours, theirs in (("q", "dq"), ("gamma", "dgamma"), ("initial_state", "dh0")):
        if ours in inputs:
            assert relative(inputs[ours].grad, complex_of(name + theirs)) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("case", ["plain", "cont", "pad", "padcont", "feature"])
def test_timestep_norm(case: str, backend: str) -> None:
    name = f"timestep_norm.{case}."
    leaves = {k: TENSORS[name + k].clone().requires_grad_() for k in ("x", "weight", "bias", "prev_mean", "prev_var")}
    y, count, mean, var = ops.timestep_norm(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        CASES[name[:-1]]["num_groups"],
        TENSORS[name + "prev_count"],
        leaves["prev_mean"],
        leaves["prev_var"],
        TENSORS.get(name + "padding_mask"),
        backend=backend,
    )
    assert torch.equal(count, TENSORS[name + "count"])
    for actual, expected in ((y, "y"), (mean, "mean"), (var, "var")):
        assert relative(actual, TENSORS[name + expected]) < 1e-5
    torch.autograd.backward([y, mean, var], [TENSORS[name + d] for d in ("dy", "dmean", "dvar")])
    for key, leaf in leaves.items():
        assert relative(leaf.grad, TENSORS[f"{name}d{key}"]) < 1e-4
