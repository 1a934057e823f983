"""What a training checkpoint holds, written to and read from a folder: nothing but safetensors, JSON and YAML.

model/                   the model and its tokenizer as Transformers saves them, a card, a loader for other tools
optimizer.safetensors    AdamW's moments by parameter name
random.safetensors       every generator
carried.safetensors      the states that streamed rows carry to the next step
trainer.json             the step, the loader's position, the best held-out loss
config.yaml              the resolved config
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalodon.data import Tokenizer
from megalodon.files import disk_errors, load_tensors, save_json, save_tensors
from megalodon.inference.loading import quiet_transformers
from megalodon.models import CausalLM
from megalodon.training.checkpoint import CheckpointError
from megalodon.training.config import TrainConfig
from megalodon.training.config_file import config_text
from megalodon.training.snapshot import (
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
    tensor_bytes,
)
from megalodon.training.step import States


@dataclass
class TrainingState:
    """What changes from step to step beside weights, optimiser and generators.

    Attributes:
        step: updates made.
        tokens: tokens read.
        seconds: time spent in steps, over all the processes that had a part in the run.
        record: the last step's metrics if they are not yet written, because a signal came before its evaluation ended.
        best_loss, best_step: lowest held-out loss that has a checkpoint, and its step.
        documents: how many were begun; a document of every epoch counts anew.
        held_out: what identifies the held-out documents, by source.
        loader: the loader's position, as its `state_dict` gives it.
        threads: PyTorch's threads, on which the last bits of a float depend.
        states: what streamed rows carry.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    record: dict[str, Any] | None = None
    best_loss: float | None = None
    best_step: int | None = None
    documents: int = 0
    held_out: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    threads: int = field(default_factory=torch.get_num_threads)
    states: States = field(default_factory=list)


def save_model(folder: Path, model: CausalLM, tokenizer: Tokenizer) -> None:
    """The model and its tokenizer as one folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    with quiet_transformers(), disk_errors(folder):
        model.save_pretrained(folder, max_shard_size="10000GB")  # one file, which `load_weights` reads back
    with disk_errors(folder):
        tokenizer.save(folder)


def load_weights(folder: Path, model: CausalLM) -> None:
    """Put the weights of a folder of `save_model` into the model.

    Raises:
        CheckpointError: if a parameter is missing, has another shape, or belongs to no parameter.
    """
    try:
        missing, unexpected = model.read_weights(folder)
    except RuntimeError as error:  # other shapes
        raise CheckpointError(f"{folder} holds the weights of another model: {error}") from None
    tied = set(model.all_tied_weights_keys)
    wrong = sorted((set(missing) - tied) | set(unexpected))
    if wrong:
        raise CheckpointError(f"{folder} holds the weights of another model: {wrong[0]} is only in one of them")


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, states: States) -> int:
    """What the tensors of a checkpoint take on the disk."""
    carried = sum(state.nbytes for state in states if state is not None)
    return carried + tensor_bytes(dict(model.state_dict()), optimizer_tensors(model, optimizer))


def write_contents(
    folder: Path,
    config: TrainConfig,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    state: TrainingState,
) -> None:
    """Write a checkpoint's files into an empty folder."""
    save_model(folder / "model", model, tokenizer)
    save_tensors(folder / "optimizer.safetensors", optimizer_tensors(model, optimizer))
    save_tensors(folder / "random.safetensors", random_tensors())
    carried = [part for part in state.states if part is not None]
    if carried:
        tensors = [part.state_dict().items() for part in carried]
        save_tensors(
            folder / "carried.safetensors",
            {f"{index}/{name}": tensor for index, part in enumerate(tensors) for name, tensor in part},
        )
    plain = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "states"}
    save_json(folder / "trainer.json", plain)
    (folder / "config.yaml").write_text(config_text(config), encoding="utf-8")


def read_contents(folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Put a checkpoint's weights, optimiser and generators in place, and return the rest.

    Raises:
        CheckpointError: if they are those of another model.
    """
    load_weights(folder / "model", model)
    restore_optimizer(model, optimizer, load_tensors(folder / "optimizer.safetensors"))
    state = TrainingState(**json.loads((folder / "trainer.json").read_text(encoding="utf-8")))
    if (folder / "carried.safetensors").exists():
        state.states = _read_carried(folder / "carried.safetensors", model)
    restore_random(load_tensors(folder / "random.safetensors"))
    return state


def _read_carried(path: Path, model: CausalLM) -> States:
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        index, _, name = key.partition("/")
        parts.setdefault(int(index), {})[name] = tensor
    return [model.read_state(parts[index]) for index in sorted(parts)]
