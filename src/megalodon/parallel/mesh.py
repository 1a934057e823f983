"""The mesh: five numbers that say how a model and its batches are cut over processes, checked before anything is built.

Ranks are laid out with the tensor axis innermost, because its messages are largest and most frequent, and the pipeline
outermost: `rank = (((pipeline * R + replicate) * S + shard) * C + chunk) * T + tensor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from megalodon.models import Config

AXES = ("pipeline", "replicate", "shard", "chunk", "tensor")
"""From the outermost to the innermost."""

PARAMETER_AXES = ("pipeline", "replicate", "weights", "tensor")
"""The axes as parameters see them. Chunk ranks hold the same weights and other tokens, as data ranks do, so the weights
are cut over `shard` x `chunk`, as one axis."""


@dataclass(frozen=True)
class MeshSizes:
    """How many ways each thing is cut; their product is the number of processes.

    Attributes:
        replicate: copies of the weights, each with rows of its own.
        shard: weights, gradients and optimiser cut over ranks, each with rows of its own (FSDP2).
        tensor: heads, channels, feed-forward and vocabulary.
        pipeline: consecutive layers.
        chunk: the sequence.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    chunk: int = 1

    @property
    def world_size(self) -> int:
        """Processes."""
        return math.prod(self.values())

    @property
    def data(self) -> int:
        """Ways in which the rows of a batch are cut."""
        return self.replicate * self.shard

    def values(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return tuple(getattr(self, name) for name in AXES)

    def __str__(self) -> str:
        cut = [f"{field.name} {getattr(self, field.name)}" for field in fields(self) if getattr(self, field.name) > 1]
        return " x ".join(cut) or "one process"


def mesh_problems(
    sizes: MeshSizes,
    config: Config,
    *,
    world_size: int,
    batch_size: int,
    sequence_length: int,
    accumulation_steps: int = 1,
    virtual_stages: int = 1,
) -> list[str]:
    """Why a mesh cannot work for a model and its batches, one sentence each naming the key; empty when it can."""
    if not config.on_mesh:
        return [f"mesh: a {config.model_type} model is trained by one process"]
    below = [name for name in AXES if getattr(sizes, name) < 1]
    if below:
        return [f"mesh.{name}: {getattr(sizes, name)}: it must be at least 1" for name in below]
    problems = []
    if sizes.world_size != world_size:
        product = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes.values(), strict=True))
        problems.append(f"mesh: {product} makes {sizes.world_size} processes, and there are {world_size}")
    rows = sizes.data * accumulation_steps
    if batch_size % rows:
        problems.append(
            f"mesh: data.batch_size {batch_size} must be a multiple of replicate {sizes.replicate} x shard "
            f"{sizes.shard} x run.accumulation_steps {accumulation_steps} = {rows}"
        )
    if sequence_length < sizes.chunk:
        problems.append(
            f"mesh.chunk: {sizes.chunk} ranks need at least as many tokens: data.sequence_length is {sequence_length}"
        )
    if sizes.chunk > 1 and not config.chunk_axis:
        problems.append(f"mesh.chunk: the sequence of a {config.model_type} model cannot be cut: it must be 1")
    problems += tensor_problems(sizes.tensor, config)
    problems += pipeline_problems(sizes.pipeline, virtual_stages, accumulation_steps, config)
    return problems


def tensor_problems(size: int, config: Config) -> list[str]:
    """Which sizes of the model the tensor axis does not divide."""
    if size > 1 and not config.tensor_fields:
        return [f"mesh.tensor: a {config.model_type} model cannot be cut by heads and channels: it must be 1"]
    named = {name: getattr(config, name) for name in (*config.tensor_fields, "vocab_size")}
    if config.output_size is not None:
        named["output_size"] = config.output_size
    return [
        f"mesh.tensor: {size} does not divide model.{name} {value}" for name, value in named.items() if value % size
    ]


def pipeline_problems(size: int, virtual_stages: int, accumulation_steps: int, config: Config) -> list[str]:
    """Why the layers cannot be cut into stages, or a step into as many micro-batches as the stages need."""
    problems = []
    if virtual_stages < 1:
        problems.append(f"mesh.virtual_stages: {virtual_stages}: it must be at least 1")
    elif virtual_stages > 1 and size == 1:
        problems.append(f"mesh.virtual_stages: {virtual_stages} needs mesh.pipeline of at least 2")
    elif config.num_layers < size * virtual_stages:
        problems.append(
            f"mesh.pipeline: {size} x virtual_stages {virtual_stages} stages need at least as many layers: "
            f"model.num_layers is {config.num_layers}"
        )
    if size > 1 and accumulation_steps % size:
        problems.append(
            f"mesh.pipeline: run.accumulation_steps {accumulation_steps} are its micro-batches: "
            f"they must be a multiple of the {size} stages"
        )
    return problems


class Mesh:
    """A built mesh: this process's place in it and the groups it talks to.

    Args:
        timeout: seconds after which a collective of any axis fails; None leaves each group what PyTorch gives it.

    Raises:
        ValueError: the process group has another number of ranks than the sizes make.
    """

    def __init__(self, sizes: MeshSizes, device_type: str, timeout: float | None = None) -> None:
        if dist.get_world_size() != sizes.world_size:
            raise ValueError(f"mesh: {sizes} makes {sizes.world_size} processes, and there are {dist.get_world_size()}")
        self.sizes, self.device_type = sizes, device_type
        self.root = init_device_mesh(device_type, sizes.values(), mesh_dim_names=AXES)
        self.parameters = self._parameters()
        if timeout is not None:  # groups of some of the ranks do not take over the default group's
            for group in (*self.root.get_all_groups(), *self.parameters.get_all_groups()):
                _set_pg_timeout(timedelta(seconds=timeout), group)

    def _parameters(self) -> DeviceMesh:
        """The same ranks as a mesh of PARAMETER_AXES, of the same groups."""
        sizes = self.sizes
        ranks = torch.arange(sizes.world_size).view(sizes.pipeline, sizes.replicate, -1, sizes.tensor)
        weights = self.group("shard")
        if sizes.chunk > 1:  # never the chunk axis' own group: there, small summaries would wait behind weights
            weights, _ = dist.new_subgroups_by_enumeration(ranks.movedim(2, -1).flatten(0, -2).tolist())
        groups = [self.group("pipeline"), self.group("replicate"), weights, self.group("tensor")]
        return DeviceMesh.from_group(groups, self.device_type, ranks, mesh_dim_names=PARAMETER_AXES)

    @property
    def weights(self) -> DeviceMesh | None:
        """The mesh over which FSDP2 cuts and copies the weights; None where each rank has its own."""
        if self.sizes.replicate > 1:
            return self.parameters["replicate", "weights"]
        return self.parameters["weights"] if self.sizes.shard * self.sizes.chunk > 1 else None

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along one axis only."""
        return self.root.get_group(axis)

    def rank(self, axis: str) -> int:
        """This process's place along an axis."""
        return self.root.get_local_rank(axis)

    @cached_property
    def data_rank(self) -> int:
        """Which of the `sizes.data` parts of the rows this process has."""
        return self.rank("replicate") * self.sizes.shard + self.rank("shard")

    @cached_property
    def counts(self) -> bool:
        """Whether this process speaks for its rows: one of those that hold the same rows does."""
        return all(self.rank(axis) == 0 for axis in ("pipeline", "chunk", "tensor"))
