"""Tokens per second, memory and utilisation of a mesh on GPUs, beside what the planner says of it.

    python benchmarks/gpu/parallel_throughput.py                            # one process, one GPU
    torchrun --standalone --nproc-per-node=8 benchmarks/gpu/parallel_throughput.py \
        --model 1.3b --length 32768 --rows 1 --parts 4 --mesh shard=4,chunk=2

Random tokens; forward, backward, clipping and AdamW; rank 0 reports. No rank ever holds the whole model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from _gpu import DEVICE, Output, Rehearse, Report, attempt, ceilings, require_device, synchronize
from torch import Tensor

from megalodon import MegalodonConfig
from megalodon.parallel import Mesh, MeshSizes, ParallelModel, Rows
from megalodon.parallel.hardware import HARDWARE
from megalodon.parallel.initial import empty_model
from megalodon.parallel.planning import Job, make_plan, model_flops

TINY = {
    "num_layers": 1, "model_dim": 16, "z_dim": 16, "value_dim": 32, "num_heads": 1, "vocab_size": 64,
    "ffn_hidden_dim": 32, "chunk_size": 16, "norm_num_groups": 2, "cema_ndim": 2,
}  # fmt: skip


def numbers(text: str) -> dict[str, int]:
    """`shard=4,chunk=2` as a dictionary.

    Raises:
        typer.BadParameter: it does not read like that.
    """
    try:
        return {key: int(value) for key, value in (pair.split("=") for pair in text.split(",") if pair)}
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write it like shard=4,chunk=2") from None


def join() -> torch.device:
    """Enters the group of torchrun's processes, or of this process alone; its device."""
    backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no other machine, and perhaps no network
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return torch.device(DEVICE.type, 0) if DEVICE.type == "cuda" else DEVICE
    if DEVICE.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group(backend, device_id=device)
        return device
    dist.init_process_group(backend)
    return DEVICE


def random_parameters(config: MegalodonConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Small numbers, the same on every rank, drawn on the device: drawing those of training takes a CPU a minute."""
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in empty_model(config).named_parameters():
        yield name, torch.randn(parameter.shape, device=device, generator=generator).mul_(0.02)


def measure(model: ParallelModel, rows: list[Rows], tokens: int, steps: int) -> float:
    """Seconds of a step, the median after two to warm up; `tokens`: of the whole batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(steps + 2):
        synchronize()
        begin = perf_counter()
        optimizer.zero_grad()
        model.accumulate_gradients(rows, tokens)
        model.clip_gradients(1.0)
        optimizer.step()
        synchronize()
        times.append(perf_counter() - begin)
    return median(times[2:])


def main(
    rehearse: Rehearse = False,
    output: Output = None,
    model: Annotated[str, typer.Option(help="A preset.")] = "1.3b",
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 32768,
    rows: Annotated[int, typer.Option(help="Of a micro-batch on one data rank.")] = 1,
    parts: Annotated[int, typer.Option(help="Micro-batches.")] = 1,
    steps: Annotated[int, typer.Option(help="Timed ones.")] = 5,
    mesh: Annotated[str, typer.Option(help="Such as shard=4,chunk=2.")] = "",
    hardware: Annotated[str, typer.Option(help=f"What the plan assumes: {', '.join(HARDWARE)}.")] = "h100",
    checkpointing: Annotated[bool, typer.Option(help="Compute every block twice, to save memory.")] = True,
    plan: Annotated[bool, typer.Option(help="Plan the same step: half a minute of a CPU.")] = True,
) -> None:
    """Times a step on one mesh, writes JSON and a table; exit status 1 if it failed."""
    require_device()
    if rehearse:
        length, steps = 32, 1
    device, sizes = join(), MeshSizes(**numbers(mesh))
    config = MegalodonConfig.from_preset(model, **(TINY if rehearse else {}))
    batch = rows * parts * sizes.data
    report = Report("parallel", "A training step on a mesh", {"model": model, "mesh": vars(sizes)}, output)

    flops = model_flops(config, length) * batch * length / sizes.world_size

    def step() -> dict[str, Any]:
        whole = empty_model(config)
        if checkpointing:  # Transformers renames the method in 5.x
            getattr(whole, "activation_checkpointing_enable", whole.gradient_checkpointing_enable)()
        parallel = ParallelModel(whole, Mesh(sizes, DEVICE.type), device, "bfloat16")
        parallel.fill(random_parameters(config, device))
        ids = torch.randint(config.vocab_size, (rows, length), device=device)
        seconds = measure(parallel, [Rows(ids, ids, None, None, False)] * parts, batch * length, steps)
        rate = ceilings().matrix_floor(flops) / (1e3 * seconds)
        return {"ms": 1e3 * seconds, "tokens_per_second": batch * length / seconds, "of_matrix_rate": rate}

    def plan_row() -> dict[str, Any]:
        job = Job(config, sizes.world_size, length, batch)
        found = make_plan(job, HARDWARE[hardware], sizes, parts, checkpointing)
        return {"hardware": hardware, "ms": 1e3 * found.seconds, "memory_gib": found.memory.total / 2**30}

    names = {"model": model, "mesh": mesh or "one process", "batch": batch, "length": length}
    found, passed = attempt(step, **names), True
    if dist.get_rank() == 0:
        report.add("step", found)
        if plan:
            report.add("plan", attempt(plan_row, **names))
        passed = report.finish()
    dist.destroy_process_group()
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
