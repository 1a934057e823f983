"""The threads that PyTorch's own operators run on, for compiled kernels: one pool in a process, not two that fight.

PyTorch's CPU operators share OpenMP's threads. Kernels here run in a parallel region of the same library, with as many
threads as PyTorch uses (`torch.set_num_threads`), and wait for one another at its barriers.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

_NEEDED = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


class Pool(NamedTuple):
    """OpenMP's functions in this process.

    Attributes:
        parallel: `GOMP_parallel(function, data, threads, flags)`.
        barrier, number, team: addresses of functions without arguments, to be called in a parallel region.
    """

    parallel: Callable[..., Any]
    barrier: int
    number: int
    team: int


@cache
def pool() -> Pool | None:
    """The pool of PyTorch's OpenMP; None where that has other names (not GNU's, nor compatible with it).

    Names are looked up as PyTorch's own are: first in the process, where another OpenMP may have been loaded before
    it, then among the libraries that PyTorch brought.
    """
    if "OpenMP" not in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]:
        return None
    libraries = [None, *Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*")]
    for name in libraries:
        try:
            library = ctypes.CDLL(None if name is None else str(name))
            functions = [getattr(library, needed) for needed in _NEEDED]
        except (OSError, AttributeError, TypeError):
            continue
        parallel, *others = functions
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return Pool(parallel, *(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in others))
    return None


class Kernel:
    """A compiled `void kernel(int64 *table)`, on all threads of the pool or on one, whichever has been quicker.

    All threads are quicker on an idle machine. Beside busy processes a team waits at each barrier for its slowest
    member, who may not be running at all, and one thread gets more done. Results do not depend on it.
    """

    def __init__(self, address: int) -> None:
        self._address, self._alone = address, _FUNCTION(address)
        self._balances: dict[int, Balance] = {}

    def __call__(self, table: np.ndarray, size: int) -> None:
        """Run it. Python's lock is not held.

        Args:
            table: int64; the first three are set here, to the pool's `barrier`, `number` and `team`, or 0 for one
                thread.
            size: of the work; calls of one size take about as long as each other.
        """
        found, threads = pool(), torch.get_num_threads()
        balance = self._balances.setdefault(size, Balance())
        alone = threads == 1 or found is None or balance.choose() == ALONE
        began = time.perf_counter()
        if alone or found is None:
            table[:3] = 0
            self._alone(table.ctypes.data)
        else:
            table[:3] = found[1:]
            found.parallel(self._address, table.ctypes.data, threads, 0)
        if threads > 1:
            balance.took(time.perf_counter() - began)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
TEAM, ALONE = 0, 1
TRIED_AGAIN = 64
"""Calls after which the slower way is tried again, for each time that it takes longer."""


class Balance:
    """Which of two ways is quicker, from what their calls took."""

    def __init__(self) -> None:
        self._seconds: list[float | None] = [None, None]
        self._warm = [False, False]
        self._calls, self._again, self._way, self._tried = 0, TRIED_AGAIN // 8, TEAM, False

    def choose(self) -> int:
        """The way of the next call, whose time must then be told."""
        self._calls += 1
        team, alone = self._seconds
        better = ALONE if team is not None and alone is not None and alone < team else TEAM
        self._way, self._tried = better, self._calls >= self._again
        if self._tried:
            self._way = 1 - better
            known, other = self._seconds[better], self._seconds[1 - better]
            ratio = other / known if known and other else 1.0
            self._again = self._calls + (int(TRIED_AGAIN * max(ratio, 1.0)) if self._warm[self._way] else 1)
        return self._way

    def took(self, seconds: float) -> None:
        """What the call took; a way's first call also wakes threads and brings memory, and says nothing."""
        if not self._warm[self._way]:
            self._warm[self._way] = True
            return
        before = self._seconds[self._way]
        fresh = before is None or (self._tried and seconds < before)  # what was known of it was old
        self._seconds[self._way] = seconds if fresh or before is None else before + (seconds - before) / 4
