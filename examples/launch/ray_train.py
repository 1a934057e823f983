"""The same run under Ray Train, which gives each worker the variables that torchrun would.

python ray_train.py run.yaml --workers 16
"""

from __future__ import annotations

import argparse

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(settings: dict) -> None:
    """One worker: exactly what the command does."""
    import os

    import torch.distributed as dist

    from megalodon.cli import main

    if dist.is_initialized():  # Ray has made a group; the run makes its own, of the same processes
        dist.destroy_process_group()
    context = ray.train.get_context()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the group's own port is still in use
    os.environ.update(
        RANK=str(context.get_world_rank()),
        LOCAL_RANK=str(context.get_local_rank()),
        WORLD_SIZE=str(context.get_world_size()),
    )
    main(["train", settings["config"]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args()
    TorchTrainer(
        work,
        train_loop_config={"config": arguments.config},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=True),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()
