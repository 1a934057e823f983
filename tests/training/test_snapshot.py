"""Optimiser and generator states survive a round trip through tensors, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from megalodon.files import load_tensors, save_tensors
from megalodon.training import snapshot
from megalodon.training.checkpoint import CheckpointError
from megalodon.training.optimizer import OptimizerConfig, build_optimizer


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    return model, build_optimizer(model, OptimizerConfig(decay_norms_and_biases=False))


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_continues_bit_for_bit(tmp_path):
    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    save_tensors(tmp_path / "o.safetensors", snapshot.optimizer_tensors(model, optimizer))

    other, fresh = make(seed=9)
    other.load_state_dict(model.state_dict())
    snapshot.restore_optimizer(other, fresh, load_tensors(tmp_path / "o.safetensors"))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, fresh, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.update({"9.weight/exp_avg": torch.zeros(1)}), "does not have: 9.weight"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("0.weight/")], "0.weight is missing"),
        (lambda t: t.update({"0.weight/exp_avg": torch.zeros(3, 3)}), r"\(3, 3\)"),
    ],
)
def test_another_models_optimizer_is_refused(change, word):
    model, optimizer = make()
    step(model, optimizer, 0)
    tensors = snapshot.optimizer_tensors(model, optimizer)
    change(tensors)
    with pytest.raises(CheckpointError, match=word):
        snapshot.restore_optimizer(*make(), tensors)


def draw():
    return torch.randn(3).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)  # noqa: NPY002


def test_generators_continue(tmp_path):
    snapshot.seed_everything(3)
    draw()  # leaves NumPy and Python with a cached normal each
    save_tensors(tmp_path / "r.safetensors", snapshot.random_tensors())
    expected = draw()
    snapshot.seed_everything(4)
    snapshot.restore_random(load_tensors(tmp_path / "r.safetensors"))
    assert draw() == expected


def test_generators_without_a_cached_normal():
    snapshot.seed_everything(3)
    tensors = snapshot.random_tensors()
    expected = draw()
    draw()
    snapshot.restore_random(tensors)
    assert draw() == expected
