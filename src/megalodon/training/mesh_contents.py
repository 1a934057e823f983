"""What a checkpoint of a run on a mesh holds, for `torch.distributed.checkpoint`: tensors that know their whole shape.

So it can be read on any other mesh: weights and optimiser by parameter name, carried states by row and channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from megalodon.models import State
from megalodon.parallel import ParallelModel
from megalodon.parallel.sharded import MODEL
from megalodon.training.snapshot import optimizer_tensors
from megalodon.training.step import States

OPTIMIZER, CARRIED = "optimizer/", "carried/"
"""How the names of what is not the model begin; those of the model begin with `sharded.MODEL`."""


def model_tensors(model: ParallelModel) -> dict[str, Tensor]:
    """This rank's parameters, by their names in the whole model."""
    return {MODEL + name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_entries(model: ParallelModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """This rank's optimiser state, by parameter name and key."""
    return {OPTIMIZER + name: value for name, value in optimizer_tensors(model, optimizer).items()}


def start_optimizer(optimizer: Optimizer) -> None:
    """Make AdamW's state, so that a checkpoint can be read into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def open_width(model: ParallelModel, states: States) -> int:
    """Places that the open chunks of all ranks need; 0 where nothing is carried."""
    kind, own = _state_class(model), 0
    for state in states:
        if state is not None:
            shapes = kind.shapes(state.dimensions)
            own = max(own, *(x.shape[1] for name, x in state.state_dict().items() if -1 in shapes[name]), 0)
    width = torch.tensor(own)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    return int(width)


def carried_tensors(model: ParallelModel, states: States, width: int) -> dict[str, Tensor]:
    """The states of this rank's rows as parts of those of all rows; empty where nothing is carried.

    Args:
        states: one for each part of a step's batch.
        width: places of an open chunk, the same on all ranks.
    """
    carried = [state for state in states if state is not None]
    if not carried:
        return {}
    state = State.concatenate(carried)
    shapes, tensors = state.shapes(state.dimensions), {"position": state.position}
    parts = [(f"layers.{index}.", state.layers[place]) for place, index in enumerate(model.layers)]
    if model.has_last and state.final is not None:
        parts.append(("final_norm.", state.final))
    for prefix, memory in parts:
        for name, tensor in memory.tensors(state.position, state.dimensions).items():
            tensors[prefix + name] = _to_width(tensor, width) if -1 in shapes[prefix + name] else tensor
    return {CARRIED + name: _cut(model, tensor, _cut_dimension(model, name)) for name, tensor in tensors.items()}


def empty_tensors(model: ParallelModel, rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zeros of the shapes of `carried_tensors`, to read a checkpoint's into.

    Args:
        rows: this rank's. dtype: of keys and values.
    """
    kind, device, ranks = _state_class(model), model.device, model.mesh.sizes.tensor
    statistics = torch.float32 if device.type == "mps" else torch.float64
    tensors = {}
    for name, shape in kind.shapes(kind.dimensions_class.of(model.config)).items():
        if not _is_own(model, name):
            continue
        cut = _cut_dimension(model, name)
        sizes = [rows if s is None else width if s < 0 else s // ranks if i == cut else s for i, s in enumerate(shape)]
        where = "cpu" if name == "position" else device
        own = torch.zeros(sizes, dtype=kind.tensor_dtype(name, dtype, statistics), device=where)
        tensors[CARRIED + name] = _cut(model, own, cut)
    return tensors


def states_of(model: ParallelModel, tensors: Mapping[str, Any], parts: int) -> States:
    """The inverse of `carried_tensors`: one state for each of `parts` equal parts of this rank's rows."""
    kind = _state_class(model)
    sizes = kind.dimensions_class.of(model.config)

    def own(prefix: str) -> dict[str, Tensor]:
        named = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        return {name: x.to_local() if isinstance(x, DTensor) else x for name, x in named.items()}

    layers = [kind.layer_from(own(f"{CARRIED}layers.{index}."), sizes, index) for index in model.layers]
    final = kind.final_from(own(f"{CARRIED}final_norm."), sizes) if model.has_last else None
    whole = kind(layers, final, own(CARRIED)["position"].cpu(), sizes)
    size = whole.batch_size // parts
    return [whole[slice(first, first + size)] for first in range(0, whole.batch_size, size)]


def _state_class(model: ParallelModel) -> type[State]:
    kind: type[State] = model.stages[0].kind.state_class
    return kind


def _is_own(model: ParallelModel, name: str) -> bool:
    """Whether a tensor of a whole state is this rank's: of one of its layers, or of its final norm."""
    if name.startswith("layers."):
        return int(name.split(".")[1]) in model.layers
    return name == "position" or model.has_last


def _cut_dimension(model: ParallelModel, name: str) -> int | None:
    return _state_class(model).cut_dimensions.get(name.rsplit(".", 1)[-1])


def _to_width(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[1]
    return x[:, :width] if missing <= 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)


def _cut(model: ParallelModel, own: Tensor, dimension: int | None) -> Tensor:
    """This rank's rows, and its part of `dimension`, as a part of the whole."""
    placements: list[Placement] = [Shard(0), Shard(0), Replicate() if dimension is None else Shard(dimension)]
    mesh = model.mesh.root["replicate", "shard", "tensor"]
    return DTensor.from_local(own.detach().contiguous(), mesh, placements, run_check=False)
