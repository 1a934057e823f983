"""Which mesh for a model on so many devices: memory, traffic and time of each that can work, best first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megalodon.models import Config
from megalodon.parallel.hardware import Hardware
from megalodon.parallel.memory import Memory, stage_memory
from megalodon.parallel.mesh import MeshSizes, mesh_problems
from megalodon.parallel.stage import stage_layers
from megalodon.parallel.traffic import (
    Step,
    Traffic,
    block_parameters,
    chunk_traffic,
    end_parameters,
    pipeline_traffic,
    tensor_traffic,
    weights_traffic,
)

RESERVED = 0.08
"""Part of a device's memory left for the context, the libraries and fragmentation."""

TOKENS = 4 * 2**20
"""In a step, where nothing else is asked for."""


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        context: tokens in a row of a step. batch_size: rows in a step, over all devices.
        precision: "bfloat16" or "float32". streamed: rows carry their memory from step to step.
    """

    config: Config
    devices: int
    context: int
    batch_size: int
    precision: str = "bfloat16"
    streamed: bool = False


@dataclass(frozen=True)
class Plan:
    """One way to train a job. Memory is of the fullest rank; `wire` is bytes sent a step by axis; `exposed` the seconds
    of them that no computing hides; `idle` the pipeline's seconds of waiting."""

    sizes: MeshSizes
    accumulation_steps: int
    checkpointing: bool
    memory: Memory
    flops: float
    wire: dict[str, float]
    exposed: dict[str, float]
    compute: float
    idle: float
    utilisation: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.idle + sum(self.exposed.values())


def model_flops(config: Config, context: int) -> float:
    """Floating-point operations of a token's training, as `training_flops_per_token` counts them."""
    table, head = end_parameters(config)
    parameters = config.num_layers * sum(block_parameters(config)) + (table if config.share_emb else 0) + head
    return 6.0 * (parameters + config.sequence_multiply_adds(context))


def default_rows(devices: int, context: int) -> int:
    """Rows of a step of about `TOKENS` tokens: the odd factor of the devices, which no other axis may be able to take,
    times a power of two, which any can share."""
    odd = devices // (devices & -devices)
    return odd << max(round(math.log2(TOKENS / context / odd)), 0)


def plans(job: Job, hardware: Hardware) -> list[Plan]:
    """All meshes that can work and fit the memory, the quickest first.

    Raises:
        ValueError: there is none, and why.
    """
    found, needed = [], []
    for sizes in candidates(job, hardware):
        for parts in _accumulations(job, sizes):
            for checkpointing in (False, True):
                plan = make_plan(job, hardware, sizes, parts, checkpointing)
                if plan.memory.total <= (1 - RESERVED) * hardware.memory:
                    found.append(plan)
                    break
                needed.append(plan.memory.total)
    if not found:
        what = f"no mesh of {job.devices} devices for {job.batch_size} rows of {job.context:,} tokens"
        if not needed:
            raise ValueError(f"{what}: they cannot be shared out; a batch size that {job.devices} divides always can")
        raise ValueError(
            f"{what}: the leanest needs {min(needed) / 2**30:.1f} GiB on each, and {hardware.name} has "
            f"{(1 - RESERVED) * hardware.memory / 2**30:.1f} to give; take more devices, or shorter rows"
        )
    return sorted(found, key=lambda plan: (plan.seconds, plan.sizes.values()))


def candidates(job: Job, hardware: Hardware) -> Iterator[MeshSizes]:
    """Meshes of so many devices that do not contradict the model or the batch; the tensor axis stays in a node."""
    n = job.devices
    for tensor in _divisors(min(n, hardware.devices_per_node)):
        for pipeline in _divisors(n // tensor) if n % tensor == 0 else ():
            for chunk in _divisors(n // tensor // pipeline):
                data = n // tensor // pipeline // chunk
                if job.batch_size % data or job.context % chunk:
                    continue
                # Spans of whole chunks: smaller ones would exchange keys and values in every layer.
                if chunk > 1 and (job.context // chunk) % job.config.chunk_size:
                    continue
                for shard in _divisors(data):
                    sizes = MeshSizes(data // shard, shard, tensor, pipeline, chunk)
                    if not problems(job, sizes, _fewest_parts(job, sizes)):
                        yield sizes


def problems(job: Job, sizes: MeshSizes, parts: int) -> list[str]:
    """As `mesh_problems`."""
    return mesh_problems(
        sizes,
        job.config,
        world_size=job.devices,
        batch_size=job.batch_size,
        sequence_length=job.context,
        accumulation_steps=parts,
    )


def make_plan(job: Job, hardware: Hardware, sizes: MeshSizes, parts: int, checkpointing: bool) -> Plan:
    """The figures of one mesh."""
    config = job.config
    bytes_ = 2 if job.precision == "bfloat16" else 4
    step = Step(job.batch_size // sizes.data // parts, parts, job.context, bytes_, checkpointing)
    ranges = stage_layers(config.num_layers, sizes.pipeline)
    memory = max(
        (stage_memory(config, sizes, step, len(layers), place, job.streamed) for place, layers in enumerate(ranges)),
        key=lambda memory: memory.total,
    )
    layers = max(map(len, ranges))
    one = sizes.pipeline == 1  # else a stage with one of the two ends
    traffic = weights_traffic(config, sizes, step, layers, one, True) | {
        "tensor": tensor_traffic(config, sizes, step, layers, one, True),
        "chunk": chunk_traffic(config, sizes, step, layers, True),
        "pipeline": pipeline_traffic(config, sizes, step),
    }
    flops = model_flops(config, job.context) * job.batch_size * job.context
    peak = hardware.peak_flops * hardware.efficiency
    compute = flops * (4 / 3 if checkpointing else 1) / job.devices / peak
    exposed = _exposed(traffic, sizes, hardware, compute)
    idle = (compute + exposed["tensor"]) * (sizes.pipeline - 1) / parts
    plan = Plan(
        sizes=sizes,
        accumulation_steps=parts,
        checkpointing=checkpointing,
        memory=memory,
        flops=flops,
        wire={axis: value.bytes_ for axis, value in traffic.items()},
        exposed=exposed,
        compute=compute,
        idle=idle,
        utilisation=0.0,
    )
    utilisation = flops / (plan.seconds * job.devices * hardware.peak_flops)
    return Plan(**{**vars(plan), "utilisation": utilisation})


def _exposed(traffic: dict[str, Traffic], sizes: MeshSizes, hardware: Hardware, compute: float) -> dict[str, float]:
    """Seconds of each axis that computing does not hide: all of the tensor axis, what exceeds the computing of the
    weights, latencies and messages of the chunk axis, messages of the pipeline."""
    seconds = {axis: _seconds(value, axis, sizes, hardware) for axis, value in traffic.items()}
    weights = seconds["shard"] + seconds["replicate"]
    left = max(0.0, weights - compute)
    share = left / weights if weights else 0.0
    return {**seconds, "shard": seconds["shard"] * share, "replicate": seconds["replicate"] * share}


def _seconds(traffic: Traffic, axis: str, sizes: MeshSizes, hardware: Hardware) -> float:
    """Time on the wire. An axis is inside a node while it and all axes inside it make no more than a node."""
    inside = {
        "tensor": sizes.tensor,
        "chunk": sizes.tensor * sizes.chunk,
        "shard": sizes.tensor * sizes.chunk * sizes.shard,
        "replicate": sizes.tensor * sizes.chunk * sizes.shard * sizes.replicate,
        "pipeline": sizes.world_size,
    }[axis]
    if inside <= hardware.devices_per_node:
        return traffic.bytes_ / hardware.inside + traffic.count * hardware.latency_inside
    return traffic.bytes_ / hardware.between + traffic.count * hardware.latency_between


def _accumulations(job: Job, sizes: MeshSizes) -> Iterator[int]:
    """Numbers of micro-batches to try."""
    rows = job.batch_size // sizes.data
    return (parts for parts in _divisors(rows) if parts % sizes.pipeline == 0 or sizes.pipeline == 1)


def _fewest_parts(job: Job, sizes: MeshSizes) -> int:
    return sizes.pipeline if job.batch_size % (sizes.data * sizes.pipeline) == 0 else 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
