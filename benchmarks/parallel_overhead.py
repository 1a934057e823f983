"""A training step on two processes of one thread each, cut along each axis in turn, beside one process of one thread.

    python benchmarks/parallel_overhead.py           # two minutes on two cores

The ideal of two processes is half of one's time. A model of 4 layers and width 256 on rows of 2048 tokens; forward,
backward, clipping and AdamW; the median of the steps after two to warm up. Writes results/parallel_overhead-MACHINE.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from _machine import describe_machine, machine_lines, machine_slug
from _report import RESULTS

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.parallel import Mesh, MeshSizes, ParallelModel, Rows

SIZES = {
    "vocab_size": 512,
    "num_layers": 4,
    "model_dim": 256,
    "z_dim": 128,
    "value_dim": 512,
    "num_heads": 2,
    "ffn_hidden_dim": 512,
    "chunk_size": 512,
    "norm_num_groups": 16,
    "swiglu": True,
}
AXES = ("replicate", "shard", "tensor", "pipeline", "chunk")


def measure(sizes: MeshSizes, rows: int, length: int, steps: int) -> float:
    """Seconds of a step on this rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ParallelModel(MegalodonForCausalLM(MegalodonConfig(**SIZES)), Mesh(sizes, "cpu"), torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    parts = 4 if sizes.pipeline > 1 else 1
    ids = torch.randint(512, (rows // sizes.data // parts, length))
    times = []
    for _ in range(steps + 2):
        dist.barrier()
        begin = perf_counter()
        optimizer.zero_grad()
        model.accumulate_gradients([Rows(ids, ids, None, None, False)] * parts, rows * length)
        model.clip_gradients(1.0)
        optimizer.step()
        times.append(perf_counter() - begin)
    return median(times[2:])


def work(rank: int, sizes: MeshSizes, meeting: str, answers: Any, settings: tuple[int, int, int]) -> None:
    """One process."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=sizes.world_size)
    seconds = measure(sizes, *settings)
    if rank == 0:
        answers.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


def run(sizes: MeshSizes, settings: tuple[int, int, int]) -> float:
    """Seconds of a step on a mesh."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        multiprocessing.spawn(work, (sizes, str(Path(folder) / "meeting"), answers, settings), nprocs=sizes.world_size)
        return answers.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    settings = (arguments.rows, arguments.length, arguments.steps)
    torch.set_num_threads(1)
    machine = describe_machine(1024)
    alone = run(MeshSizes(), settings)
    lines = [
        "# Overhead of each axis on two processes",
        "",
        *machine_lines(machine),
        f"- {arguments.rows} rows of {arguments.length} tokens, {SIZES['num_layers']} layers of width "
        f"{SIZES['model_dim']}; one thread a process; median of {arguments.steps} steps",
        "",
        "| mesh | seconds a step | of the ideal (one process / 2) |",
        "| --- | --: | --: |",
        f"| one process | {alone:.3f} | |",
    ]
    for axis in AXES:
        seconds = run(MeshSizes(**{axis: 2}), settings)
        lines.append(f"| {axis} 2 | {seconds:.3f} | {seconds / (alone / 2):.2f} |")
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / f"parallel_overhead-{machine_slug(machine)}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
