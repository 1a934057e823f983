"""Real processes over gloo, started once a session: each job makes a process group of its own among the first few."""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


def serve(rank: int, connection: Connection) -> None:
    """Run jobs until there is none."""
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        function, arguments, world_size, meeting = job
        torch.manual_seed(0)
        try:
            if isinstance(meeting, int):  # a port: the function makes the group, as under a launcher
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": meeting}
                os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
                connection.send((function(*arguments), None))
                continue
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=600),
            )
            try:
                dist.barrier()  # a rank with nothing to say to the others would be gone before they have met it
                connection.send((function(*arguments), None))
            finally:
                dist.destroy_process_group()
                forget_groups()
        except BaseException:
            dist.distributed_c10d._world.group_count = 0  # a group that failed was counted; the next has a name by it
            connection.send((None, traceback.format_exc()))


def forget_groups() -> None:
    """DTensor keeps plans and specs by mesh, and a later job's mesh may equal one whose groups are gone."""
    gc.collect()
    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    _gen_transform_infos.cache_clear()


class Ranks:
    """Processes that run a function together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.processes: list[tuple[Any, Connection]] = []

    def run(self, world_size: int, function: Callable, *arguments: Any) -> list[Any]:
        """What each of the first `world_size` ranks returned; they are one process group."""
        self.jobs += 1
        return self._run(world_size, function, arguments, self.folder / f"job-{self.jobs}")

    def launch(self, world_size: int, function: Callable, *arguments: Any) -> list[Any]:
        """The same as a launcher does it: each rank has the variables of torchrun, and no group."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return self._run(world_size, function, arguments, port)

    def _run(self, world_size: int, function: Callable, arguments: tuple, meeting: Path | int) -> list[Any]:
        while len(self.processes) < world_size:
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=serve, args=(len(self.processes), there), daemon=True
            )
            process.start()
            self.processes.append((process, here))
        job = (function, arguments, world_size, meeting)
        for _, connection in self.processes[:world_size]:
            connection.send(job)
        answers = [connection.recv() for _, connection in self.processes[:world_size]]
        failures = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        if failures:
            pytest.fail("\n".join(failures))
        return [answer for answer, _ in answers]

    def close(self) -> None:
        for process, connection in self.processes:
            connection.send(None)
            process.join(10)
