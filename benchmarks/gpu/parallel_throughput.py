"""Tokens per second, memory and utilisation of a mesh on GPUs, beside what the planner says of it.

    torchrun --standalone --nproc-per-node=8 benchmarks/gpu/parallel_throughput.py \
        --model 1.3b --length 32768 --rows 1 --parts 4 --mesh shard=4,chunk=2

Random tokens; forward, backward, clipping and AdamW; rank 0 prints one JSON line. No rank ever holds the whole model.
With `--device cpu` it runs over gloo, to try it out: nothing it then says of speed or memory means anything.
"""

from __future__ import annotations

import argparse
import json
import os
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from megalodon import MegalodonConfig
from megalodon.parallel import Mesh, MeshSizes, ParallelModel, Rows
from megalodon.parallel.hardware import HARDWARE
from megalodon.parallel.initial import empty_model, initial_parameters
from megalodon.parallel.planning import Job, make_plan, model_flops
from megalodon.training.launch import checkpoint_activations


def numbers(text: str) -> dict[str, int]:
    """`shard=4,chunk=2` as a dictionary."""
    return {key: int(value) for key, value in (pair.split("=") for pair in text.split(",") if pair)}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.3b")
    parser.add_argument("--change", type=numbers, default={}, help="sizes of the model, such as num_layers=2")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch on one data rank")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mesh", type=numbers, default={}, help="such as shard=4,chunk=2")
    parser.add_argument("--hardware", default="h100", choices=HARDWARE)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()

    on_gpu = arguments.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    sizes = MeshSizes(**arguments.mesh)
    config = MegalodonConfig.from_preset(arguments.model, **arguments.change)
    whole = empty_model(config)
    if arguments.checkpointing:
        checkpoint_activations(whole)
    model = ParallelModel(whole, Mesh(sizes, arguments.device), device, "bfloat16")
    torch.manual_seed(0)
    model.fill(initial_parameters(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (arguments.rows, arguments.length), device=device)
    batch_size = arguments.rows * arguments.parts * sizes.data
    tokens = batch_size * arguments.length
    times = []
    for _ in range(arguments.steps + 3):
        synchronize(device)
        begin = perf_counter()
        optimizer.zero_grad()
        model.accumulate_gradients([Rows(ids, ids, None, None, False)] * arguments.parts, tokens)
        model.clip_gradients(1.0)
        optimizer.step()
        synchronize(device)
        times.append(perf_counter() - begin)
    seconds, hardware = median(times[3:]), HARDWARE[arguments.hardware]
    job = Job(config, sizes.world_size, arguments.length, batch_size)
    plan = make_plan(job, hardware, sizes, arguments.parts, arguments.checkpointing)
    flops = model_flops(config, arguments.length) * tokens
    if dist.get_rank() == 0:
        result = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "mesh": vars(sizes),
            "seconds": seconds,
            "planned_seconds": plan.seconds,
            "tokens_per_second": tokens / seconds,
            "utilisation": flops / (seconds * sizes.world_size * hardware.peak_flops),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
            "planned_bytes": plan.memory.total,
        }
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
