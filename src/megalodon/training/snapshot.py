"""Optimiser and random-generator states as named tensors and plain values, so that checkpoints need no pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megalodon.training.checkpoint import CheckpointError


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """For each parameter group of the optimiser, the model's dotted names of its parameters, in order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `PARAMETER/KEY` tensors, on whatever device they live."""
    tensors = {}
    for names, group in zip(parameter_names(model, optimizer), optimizer.param_groups, strict=True):
        for name, parameter in zip(names, group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimiser the state that `optimizer_tensors` returned. Its settings stay those it was built with.

    Raises:
        CheckpointError: if a parameter's state is missing, is of another shape, or belongs to no parameter.
    """
    position = 0
    state: dict[int, dict[str, Tensor]] = {}
    left = dict(tensors)
    for names, group in zip(parameter_names(model, optimizer), optimizer.param_groups, strict=True):
        for name, parameter in zip(names, group["params"], strict=True):
            entries = {key.rpartition("/")[2]: left.pop(key) for key in list(left) if key.rpartition("/")[0] == name}
            for key, value in entries.items():
                if value.ndim and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"optimizer state {name}/{key} has shape {tuple(value.shape)}, "
                        f"the parameter has {tuple(parameter.shape)}"
                    )
            if not entries and tensors:
                raise CheckpointError(f"the optimizer state of parameter {name} is missing")
            state[position] = entries
            position += 1
    if left:
        raise CheckpointError(f"optimizer state for a parameter that the model does not have: {min(left)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_tensors() -> dict[str, Tensor]:
    """The states of the PyTorch (CPU and every CUDA device), NumPy and Python generators."""
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global generator's state is meant
    version, words, gauss_next = random.getstate()
    tensors = {
        "torch.cpu": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.cached": torch.tensor([cached], dtype=torch.float64),
        "python.words": torch.tensor([version, *words]),
        # An absent cached normal is an empty tensor: NaN could not be told from a value.
        "python.cached": torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"torch.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Set every generator to the states that `random_tensors` returned."""
    torch.set_rng_state(tensors["torch.cpu"])
    position, has_gauss = tensors["numpy.position"].tolist()
    keys = tensors["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy.cached"].item()))  # noqa: NPY002
    version, *words = tensors["python.words"].tolist()
    cached = tensors["python.cached"].tolist()
    random.setstate((version, tuple(words), cached[0] if cached else None))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"torch.cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"torch.cuda.{index}"], index)


def seed_everything(seed: int) -> None:
    """Start every generator from one seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def tensor_bytes(*collections: dict[str, Any]) -> int:
    """Bytes that the tensors of these dictionaries take on the disk."""
    return sum(v.numel() * v.element_size() for tensors in collections for v in tensors.values())
