"""The processes of a run on a mesh: how they meet, agree, and say which of them failed or does not answer."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
import transformers

import megalodon

Result = TypeVar("Result")

FOUND = (ValueError, OSError)
"""What bad input raises: reported in one line by rank 0, as the command line does for one process."""


GRACE = 5.0
"""Seconds that the first rank that sees a failure leaves the others to see theirs."""

SAYING = 0.5
"""Seconds that rank 0 has to say what is wrong, before another rank's exit has the launcher end it."""


class QuietExit(SystemExit):
    """This rank ends because of an error that rank 0 reports."""


class UnresponsiveError(RuntimeError):
    """A collective failed or timed out. Says which ranks are behind."""


def under_torchrun() -> bool:
    """Whether a launcher has given this process a rank."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def meet(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """A name for this start of the job, the same on all its ranks and never used before.

    After a restart torchrun's agents may give the processes the store of the start before, with all its keys, and their
    counts of restarts may differ. So each rank shows a number of its own, rank 0 a name with the numbers that it has
    seen, and all take the name once rank 0 has seen that everybody found its own number there.

    Raises:
        UnresponsiveError: a rank did not come in `timeout` seconds.
    """
    mine, name, shown, deadline = uuid4().hex, "", None, time.monotonic() + timeout
    store.set(f"number/{rank}", mine)

    def get(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    while time.monotonic() < deadline:
        if rank == 0:
            seen = [get(f"number/{other}") for other in range(world_size)]
            if seen != shown:
                name, shown = uuid4().hex, seen
                store.set("roster", " ".join([name, *(number or "none" for number in seen)]))
        name, *numbers = get("roster").split() or [""]
        if len(numbers) == world_size and numbers[rank] == mine:
            store.set(f"found/{rank}", name)
            if rank == 0 and all(get(f"found/{other}") == name for other in range(world_size)):
                store.set(f"go/{name}", "yes")
            if get(f"go/{name}"):
                return name
        time.sleep(0.02)
    missing = [other for other in range(world_size) if not get(f"number/{other}")] if rank == 0 else []
    named = f": {', '.join(map(str, missing))}" if missing else ""
    raise UnresponsiveError(f"rank {rank}: not all of {world_size} ranks came within {timeout:g} s{named}")


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


class Processes:
    """The process group of a run.

    Under a launcher that sets torchrun's variables it is made of all its processes, else of this one.

    Args:
        device: where this rank computes. timeout: seconds after which waiting for a rank is an error.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        limit = timedelta(seconds=timeout)
        if under_torchrun():
            store, self.rank, self.world_size = next(iter(dist.rendezvous("env://", timeout=limit)))
            store.set_timeout(limit)
            store = dist.PrefixStore(meet(store, self.rank, self.world_size, timeout), store)
        else:
            store, self.rank, self.world_size = dist.HashStore(), 0, 1
        self._store = dist.PrefixStore("progress", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
        self.seconds, self.step = timeout, 0

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()

    # --- agreement ------------------------------------------------------------------------------------------

    def together(self, work: Callable[[], Result]) -> Result:
        """Do something on every rank that may find bad input on some.

        Raises:
            ValueError, OSError: on rank 0, the first rank's error, naming the rank where it is not 0.
            QuietExit: on the other ranks.
        """
        result, error = None, None
        try:
            result = work()
        except FOUND as caught:
            error = caught
        self.agree(error)
        return result  # type: ignore[return-value]

    def agree(self, error: Exception | None) -> None:
        """Raise as `together` does if any rank has an error."""
        messages: list[str | None] = [None] * self.world_size
        dist.all_gather_object(messages, None if error is None else str(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return
        if self.rank != 0:
            time.sleep(SAYING)
            raise QuietExit(2)
        if error is not None:
            raise error
        raise ValueError(f"rank {failed[0]}: {messages[failed[0]]}")

    def require_same(self, what: str, value: str) -> None:
        """Check that a value is the same on all ranks.

        Raises:
            ValueError: on rank 0, naming the first rank that differs.
        """
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        different = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        error = None
        if different is not None and self.rank == 0:
            error = ValueError(f"{what}: rank 0 has {values[0]!r}, rank {different} has {values[different]!r}")
        self.agree(error)

    def sum(self, *numbers: float) -> list[float]:
        """The sums of these numbers over all ranks; exact for whole numbers."""
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    # --- who is behind --------------------------------------------------------------------------------------

    def report(self, step: int) -> None:
        """Let the others see that this rank has come to a step."""
        self.step = step
        self._store.set(f"step/{self.rank}", str(step))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Has the failure of a collective inside name the ranks that are to blame. Other errors pass as they are.

        Raises:
            UnresponsiveError: a collective failed or timed out.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, UnresponsiveError) or not _is_of_collective(error):
                raise
            raise self._explained(error) from error

    def _explained(self, error: RuntimeError) -> UnresponsiveError:
        try:
            if behind := self._behind():
                blamed = f"ranks that have not come to it: {_listed(behind)}"
            else:
                blamed = f"ranks that no longer answer: {_listed(self._silent(min(GRACE, self.seconds)))}"
        except RuntimeError:
            blamed = "which rank cannot be told, because the process with the store is gone"
        return UnresponsiveError(
            f"rank {self.rank}: step {self.step} failed in a collective (timeout {self.seconds:g} s); "
            f"{blamed} ({str(error).splitlines()[0]})"
        )

    def _behind(self) -> list[int]:
        """The ranks that have not come to this rank's step."""
        return [rank for rank in range(self.world_size) if int(self._get(f"step/{rank}") or 0) < self.step]

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that see no failure within some seconds of this rank's: they hang, or are gone."""
        self._store.set(f"failed/{self.rank}", "yes")
        deadline, left = time.monotonic() + seconds, list(range(self.world_size))
        while left := [rank for rank in left if not self._get(f"failed/{rank}")]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left

    def _get(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether an error comes from the network. gloo's are plain RuntimeErrors that name it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) or "none that this rank can tell"


def versions() -> str:
    """What must be the same on all ranks, so that they compute the same."""
    return (
        f"megalodon {megalodon.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {'.'.join(platform.python_version_tuple()[:2])}"
    )
