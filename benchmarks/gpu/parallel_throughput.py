"""Tokens per second, memory and utilisation of a mesh on GPUs, beside what the planner says of it.

    torchrun --standalone --nproc-per-node=8 benchmarks/gpu/parallel_throughput.py \
        --model 1.3b --length 32768 --rows 1 --parts 4 --mesh shard=4,chunk=2

Random tokens; forward, backward, clipping and AdamW; rank 0 prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.parallel import Mesh, MeshSizes, ParallelModel, Rows
from megalodon.parallel.hardware import HARDWARE
from megalodon.parallel.planning import Job, make_plan, model_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.3b")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch on one data rank")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--mesh", default="", help="such as shard=4,chunk=2")
    parser.add_argument("--hardware", default="h100", choices=HARDWARE)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    pairs = (pair.split("=") for pair in arguments.mesh.split(",") if pair)
    sizes = MeshSizes(**{axis: int(size) for axis, size in pairs})
    config = MegalodonConfig.from_preset(arguments.model)
    torch.manual_seed(0)
    whole = MegalodonForCausalLM(config)
    if arguments.checkpointing:
        whole.gradient_checkpointing_enable()
    model = ParallelModel(whole, Mesh(sizes, "cuda"), device, "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (arguments.rows, arguments.length), device=device)
    batch_size = arguments.rows * arguments.parts * sizes.data
    tokens = batch_size * arguments.length
    times = []
    for _ in range(arguments.steps + 3):
        torch.cuda.synchronize()
        begin = perf_counter()
        optimizer.zero_grad()
        model.accumulate_gradients([Rows(ids, ids, None, None, False)] * arguments.parts, tokens)
        model.clip_gradients(1.0)
        optimizer.step()
        torch.cuda.synchronize()
        times.append(perf_counter() - begin)
    seconds, hardware = median(times[3:]), HARDWARE[arguments.hardware]
    job = Job(config, sizes.world_size, arguments.length, batch_size)
    plan = make_plan(job, hardware, sizes, arguments.parts, arguments.checkpointing)
    flops = model_flops(config, arguments.length) * tokens
    if dist.get_rank() == 0:
        result = {
            "device": torch.cuda.get_device_name(device),
            "mesh": vars(sizes),
            "seconds": seconds,
            "planned_seconds": plan.seconds,
            "tokens_per_second": tokens / seconds,
            "utilisation": flops / (seconds * sizes.world_size * hardware.peak_flops),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "planned_bytes": plan.memory.total,
        }
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
