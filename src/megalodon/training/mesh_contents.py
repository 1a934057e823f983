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

from megalodon.models.layers.timestep_norm import Moments
from megalodon.models.state import Dimensions, LayerState, MegalodonState, OpenChunk
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
    own = [int(state.open_tokens.max()) for state in states if state is not None]
    width = torch.tensor(max(own, default=0))
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
    state = MegalodonState.concatenate(carried)
    tensors = {"position": _cut(model, state.position, None)}
    for place, index in enumerate(model.layers):
        layer = state.layers[place]
        tensors |= {
            f"layers.{index}.norm.mean": _cut(model, layer.moments.mean, 1),
            f"layers.{index}.norm.var": _cut(model, layer.moments.var, 1),
            f"layers.{index}.cema": _cut(model, torch.view_as_real(layer.cema), 1),
            f"layers.{index}.keys": _cut(model, _to_width(layer.chunk.keys, width), 2),
            f"layers.{index}.values": _cut(model, _to_width(layer.chunk.values, width), 2),
        }
    if model.has_last:
        tensors["final_norm.mean"] = _cut(model, state.final.mean, 1)
        tensors["final_norm.var"] = _cut(model, state.final.var, 1)
    return {CARRIED + name: tensor for name, tensor in tensors.items()}


def empty_states(model: ParallelModel, rows: int, parts: int, width: int, dtype: torch.dtype) -> States:
    """States of this rank's `rows` rows, to read a checkpoint's into.

    Args:
        dtype: of keys and values.
    """
    config, device, ranks = model.config, model.device, model.mesh.sizes.tensor
    batch, heads, groups = rows // parts, config.num_heads // ranks, config.norm_num_groups // ranks
    wide = torch.float32 if device.type == "mps" else torch.float64

    def moments() -> Moments:
        return Moments(*(torch.zeros(batch, groups, dtype=wide, device=device) for _ in range(2)))

    def layer() -> LayerState:
        h = torch.zeros(batch, config.model_dim // ranks, config.cema_ndim, dtype=torch.complex64, device=device)
        keys = torch.zeros(batch, width, heads, config.head_dim, dtype=dtype, device=device)
        chunk = OpenChunk(keys, keys.new_zeros(batch, width, heads, config.value_head_dim))
        return LayerState(moments(), h, chunk)

    return [
        MegalodonState(
            [layer() for _ in model.layers], moments(), torch.zeros(batch, dtype=torch.int64), Dimensions.of(config)
        )
        for _ in range(parts)
    ]


def states_of(model: ParallelModel, tensors: Mapping[str, Any], parts: int) -> States:
    """The inverse of `carried_tensors`: one state for each of `parts` equal parts of this rank's rows."""

    def own(name: str) -> Tensor:
        tensor = tensors[CARRIED + name]
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    layers = [
        LayerState(
            Moments(own(f"layers.{index}.norm.mean"), own(f"layers.{index}.norm.var")),
            torch.view_as_complex(own(f"layers.{index}.cema").contiguous()),
            OpenChunk(own(f"layers.{index}.keys"), own(f"layers.{index}.values")),
        )
        for index in model.layers
    ]
    if model.has_last:
        final = Moments(own("final_norm.mean"), own("final_norm.var"))
    else:
        final = Moments(*(torch.zeros_like(x) for x in layers[0].moments))
    whole = MegalodonState(layers, final, own("position").cpu(), Dimensions.of(model.config))
    size = whole.batch_size // parts
    return [whole[slice(first, first + size)] for first in range(0, whole.batch_size, size)]


def _to_width(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[1]
    return x[:, :width] if missing <= 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)


def _cut(model: ParallelModel, own: Tensor, dimension: int | None) -> Tensor:
    """This rank's rows, and its part of `dimension`, as a part of the whole."""
    placements: list[Placement] = [Shard(0), Shard(0), Replicate() if dimension is None else Shard(dimension)]
    mesh = model.mesh.root["replicate", "shard", "tensor"]
    return DTensor.from_local(own.detach().contiguous(), mesh, placements, run_check=False)
