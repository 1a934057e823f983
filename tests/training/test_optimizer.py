"""Parameter groups and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalodon.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    is_norm_or_bias,
    optimizer_problems,
    set_learning_rate,
)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.final_norm = nn.LayerNorm(4)


def test_everything_is_decayed_by_default():
    (group,) = build_optimizer(Small(), OptimizerConfig()).param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == 4


def test_norms_and_biases_can_be_spared():
    model = Small()
    decayed, spared = build_optimizer(model, OptimizerConfig(decay_norms_and_biases=False)).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model.proj.weight)]
    assert spared["weight_decay"] == 0.0
    assert len(spared["params"]) == 3


def test_frozen_parameters_are_left_out():
    model = Small()
    model.proj.weight.requires_grad_(False)
    (group,) = build_optimizer(model, OptimizerConfig()).param_groups
    assert len(group["params"]) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.attention.z_proj.bias", True),
        ("model.layers.0.attention.qk_bias", True),
        ("model.layers.0.timestep_norm.weight", True),
        ("model.layers.0.feed_forward.norm.weight", True),
        ("model.layers.0.cema.alpha", False),
        ("lm_head.weight", False),
    ],
)
def test_names(name, expected):
    assert is_norm_or_bias(name) is expected


def test_clipping_returns_the_norm_before():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], None).item() == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert clip_gradients([parameter], 1.0).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_learning_rate_reaches_every_group():
    optimizer = build_optimizer(Small(), OptimizerConfig(decay_norms_and_biases=False))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_betas_are_checked():
    (problem,) = optimizer_problems(OptimizerConfig(betas=(0.9, 1.0)))
    assert problem.startswith("optimizer.betas") and "1.0" in problem
