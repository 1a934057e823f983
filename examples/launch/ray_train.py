"""The same run under Ray Train, which gives each worker the variables that torchrun would.

python ray_train.py run.yaml --workers 16
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(settings: dict) -> None:
    """One worker: a process of its own for the command, whose signals and exit status need a main thread."""
    import torch.distributed as dist

    context = ray.train.get_context()
    port = [None]
    if context.get_world_rank() == 0:  # the port of the group that Ray made stays in use
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = [probe.getsockname()[1]]
    dist.broadcast_object_list(port)
    place = {
        "RANK": context.get_world_rank(),
        "LOCAL_RANK": context.get_local_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "MASTER_PORT": port[0],
    }
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    subprocess.run([sys.executable, "-m", "megalodon", "train", settings["config"]], env=environment, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--cpu", action="store_true", help="no GPU a worker")
    arguments = parser.parse_args()
    TorchTrainer(
        work,
        train_loop_config={"config": str(Path(arguments.config).resolve())},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=not arguments.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()
