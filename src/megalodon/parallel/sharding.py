"""Weights over ranks that read different tokens: FSDP2, sharded, replicated, or both (HSDP).

Losses are sums divided by the number of targets of the whole batch, so gradients are summed over ranks, never averaged:
a rank with fewer targets counts for fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megalodon.parallel.stage import Stage


def shard_weights(stage: Stage, mesh: DeviceMesh, precision: str, pipelined: bool = False) -> None:
    """Cut a stage's weights over a mesh of one dimension, or copy and cut them over one of two, in place.

    With `precision` "bfloat16", matrices travel and multiply in bfloat16, as autocast would have it; everything else,
    and the sums of gradients, stay in float32.

    Weights are gathered for each pass of each micro-batch; with `pipelined` once a step: a schedule keeps a stage's
    weights whole from its first backward pass on, so that gathering them anew would save no memory.
    """
    again = False if pipelined else None
    for block in stage.model.layers.values():
        if precision == "bfloat16":
            half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            linear: list[nn.Module] = [module for module in block.modules() if isinstance(module, nn.Linear)]
            fully_shard(linear, mesh=mesh, mp_policy=half, reshard_after_forward=again)
        fully_shard(block, mesh=mesh, reshard_after_forward=again)
    fully_shard(stage, mesh=mesh, reshard_after_forward=again)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def synchronize_gradients(stage: nn.Module, wanted: bool) -> None:
    """Whether the next backward passes end in communication, or only add up on each rank."""
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(wanted)


def reshard(stage: nn.Module) -> None:
    """Let each rank hold only its part of the weights again."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(x: Tensor) -> Tensor:
    """A tensor as one process would have it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(value: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a whole value that is cut as a parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    (chunk,) = parameter.__create_chunk_list__()  # where a checkpoint would put it
    return value[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))]
