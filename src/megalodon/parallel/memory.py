"""Bytes that one rank holds at the height of a step, by what they are.

Weights, gradients and optimiser follow from their numbers. What a block keeps for its backward pass is measured: tiny
blocks are run on this machine and what autograd saves is counted; it is linear in the widths of the model, so a fit
over a few gives it for any. So the figure follows the code, whatever the operators come to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon.models import Config, architecture, build_model
from megalodon.models.loss import LOGITS_AT_ONCE
from megalodon.ops.backend import default_backends
from megalodon.parallel.block import Axes
from megalodon.parallel.mesh import MeshSizes
from megalodon.parallel.stage import Rows, Stage
from megalodon.parallel.traffic import Step, block_parameters, stage_parameters

CALIBRATION_LENGTH = 512


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: this rank's parameters, float32. gathered: whole weights at work (FSDP2). gradients, optimizer: both
        moments. activations: kept for the backward pass. working: of the layer and the logits being computed.
        state: the carried memory.
    """

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    state: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@contextmanager
def counted_saved_bytes(skip: set[int]) -> Iterator[list[int]]:
    """Counts the bytes of the distinct storages that autograd saves, but for those that `skip` names by address."""
    seen: set[int] = set(skip)
    total = [0]
    keep: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            keep.append(tensor)
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Onlooker():
        yield total


class _Onlooker(TorchDispatchMode):
    """Sees every operation, so that layers are called one by one, as on a GPU, and not several as one operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def saved_bytes(config: Config, length: int, precision: str) -> int:
    """What one block of a model keeps for the backward pass of `length` tokens: of two blocks, less that of one."""

    def of(layers: int) -> int:
        model = build_model(type(config)(**{**config.to_diff_dict(), "num_layers": layers}))
        stage = Stage(model, range(layers), Axes(None, None), 0, precision)
        parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        ids = torch.zeros(1, length, dtype=torch.int64)
        with counted_saved_bytes(parameters) as total:
            loss, _ = stage(None, Rows(ids, ids, None, None, False))
        del loss
        return total[0]

    return of(2) - of(1)


@cache
def saved_bytes_fit(kind: type[Config], precision: str, swiglu: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that a block keeps, for each unit of the widths and of model_dim x cema_ndim: (a token, besides)."""
    base: dict[str, Any] = {**kind.calibration_fields, **kind.width_fields, "swiglu": swiglu}
    changes: list[dict[str, Any]] = [{}, *({name: 2 * base[name]} for name in kind.width_fields)]
    changes.append({"model_dim": 3 * base["model_dim"], "cema_ndim": 3 * base["cema_ndim"]})
    rows, growing, constant = [], [], []
    with torch.random.fork_rng(devices=[]), default_backends():  # on the CPU, where the kernels cannot run
        for change in changes:
            config = kind(**{**base, **change})
            # Two lengths, to tell what grows with them from what does not: CEMA's matrices made of coefficients.
            longer, shorter = (
                saved_bytes(config, length, precision) for length in (2 * CALIBRATION_LENGTH, CALIBRATION_LENGTH)
            )
            growing.append((longer - shorter) / CALIBRATION_LENGTH)
            constant.append(2 * shorter - longer)
            rows.append(_features(config))
    features = np.array(rows, dtype=float)
    return tuple(np.linalg.lstsq(features, np.array(bytes_), rcond=None)[0] for bytes_ in (growing, constant))


def _features(config: Config) -> list[float]:
    return [*(getattr(config, name) for name in config.width_fields), config.model_dim * config.cema_ndim]


def block_activations(config: Config, sizes: MeshSizes, step: Step) -> float:
    """Bytes that a block keeps of the tokens of one micro-batch on one rank."""
    per_token = float(np.dot(_fit(config, step)[0], _features(config))) / sizes.tensor
    if sizes.tensor > 1:  # three gathered vectors are whole on every rank; norms over ranks keep four of their steps
        per_token += 3 * config.model_dim * step.bytes_ * (1 - 1 / sizes.tensor)
        per_token += 4 * 4 * config.model_dim / sizes.tensor
    return per_token * step.tokens(sizes)


def block_constants(config: Config, sizes: MeshSizes, step: Step) -> float:
    """Bytes that a block keeps of one micro-batch, however long its rows."""
    return float(np.dot(_fit(config, step)[1], _features(config))) / sizes.tensor


def _fit(config: Config, step: Step) -> tuple[np.ndarray, np.ndarray]:
    kind: Any = type(config)
    return saved_bytes_fit(kind, "bfloat16" if step.bytes_ == 2 else "float32", config.swiglu)


def stage_memory(config: Config, sizes: MeshSizes, step: Step, layers: int, place: int, streamed: bool) -> Memory:
    """What a rank of a stage of `layers` layers holds at the height of a step; `place`: the stage's in the pipeline."""
    first, last = place == 0, place == sizes.pipeline - 1
    ranks = sizes.shard * sizes.chunk
    linear, other = block_parameters(config)
    blocks, ends = (count / sizes.tensor for count in stage_parameters(config, layers, first, last))
    block, parameters = blocks / layers, blocks + ends
    own = 4 * parameters / ranks
    wrapped = ranks * sizes.replicate > 1
    gathered = travelling = added_up = 0.0
    if wrapped:
        # Two blocks are whole at a time, as they arrive and as they are used, in a pipeline all; and the outermost.
        at_once = layers if sizes.pipeline > 1 else 4
        gathered = at_once * (linear * step.bytes_ + other * 4) / sizes.tensor + 4 * ends
        # A block's gradients are whole while they are scattered; micro-batches but the last add up all of them whole.
        travelling = 2 * 4 * max(block, ends)
        added_up = 4 * parameters if step.parts > 1 else 0.0
    tokens = step.tokens(sizes)
    kept = block_activations(config, sizes, step) + block_constants(config, sizes, step)
    stream = tokens * config.model_dim / sizes.tensor * 4
    flying = min(sizes.pipeline - place, step.parts)  # the last stage goes back with each part at once
    activations = flying * layers * (stream if step.checkpointing else kept)
    working = kept if step.checkpointing else _backward_working(config, sizes, step)
    if sizes.pipeline > 1:  # a buffer for what each micro-batch brings from either side, and what has been sent
        message = tokens * config.model_dim / sizes.tensor * 4
        working += message * (step.parts * (2 - first - last) + flying)
    if last:  # the loss is before any gradient travels
        vocabulary = (config.output_size or config.vocab_size) / sizes.tensor
        logits = min(tokens * vocabulary, LOGITS_AT_ONCE) * 12  # log-probabilities, and two of their gradients
        working = max(working, logits - travelling) + 2 * tokens * config.model_dim * step.bytes_
    return Memory(
        weights=own,
        gathered=gathered,
        gradients=own + travelling + added_up,
        optimizer=2 * own,
        activations=activations,
        working=working,
        state=_state_bytes(config, sizes, step, layers) if streamed else 0.0,
    )


def _backward_working(config: Config, sizes: MeshSizes, step: Step) -> float:
    """Gradients of activations that live together in a block's backward pass: of the widest layer and the stream."""
    widest = max((3 if config.swiglu else 2) * config.ffn_hidden_dim, 2 * config.value_dim) / sizes.tensor
    return step.tokens(sizes) * (widest + 2 * config.model_dim / sizes.tensor) * step.bytes_


def _state_bytes(config: Config, sizes: MeshSizes, step: Step, layers: int) -> float:
    """The carried memory of all of a rank's rows, open chunks empty."""
    kind = architecture(config.model_type).model.state_class
    one = kind.layer_bytes(kind.dimensions_class.of(config))
    return step.rows * step.parts * layers * one / sizes.tensor
