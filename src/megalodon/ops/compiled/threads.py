"""The threads that PyTorch's own operators run on, for compiled kernels: one pool in a process, not two that fight.

PyTorch's CPU operators share OpenMP's threads. Kernels here run in a parallel region of the same library, with as many
threads as PyTorch uses (`torch.set_num_threads`), and wait for one another at its barriers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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


def functions() -> tuple[int, int, int]:
    """The pool's `barrier`, `number` and `team` for a kernel that `run` is about to call; 0 where it runs alone."""
    found = pool()
    return (0, 0, 0) if found is None or torch.get_num_threads() == 1 else found[1:]


_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(kernel: int, arguments: int) -> None:
    """Call `void kernel(int64 *arguments)`, by address, on every thread of the pool. Python's lock is not held."""
    found, threads = pool(), torch.get_num_threads()
    if threads == 1 or found is None:
        _alone(kernel)(arguments)
    else:
        found.parallel(kernel, arguments, threads, 0)
