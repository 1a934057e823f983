"""Model FLOP utilisation: what a training step must compute, beside what this machine's matrix products reach."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import nn

from megalodon.models import Config

MATRIX_SIZE = 1024
SECONDS = 0.3


def training_flops_per_token(model: nn.Module, config: Config, length: int) -> float:
    """Floating-point operations that one token of a training step needs, forward and backward.

    6 per parameter that multiplies activations (so a look-up in an untied embedding counts none), and 6 per
    multiply-add of attention's scores and weighted values, of which a causal window needs half. Recomputation is not
    counted.

    Args:
        length: tokens in a row of the batch; attention reaches no further than this.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not config.share_emb:
        parameters -= config.vocab_size * config.model_dim
    return 6.0 * (parameters + config.sequence_multiply_adds(length))


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products of 1024 in `dtype` on `device`: the best of a third of a second's worth.

    Of a CPU: what one thread reaches in the time that it has a processor for itself, times the threads that PyTorch
    uses and the machine has. So it is the same whatever else runs there, and no step is above it.
    """
    if device.type == "cpu":
        return _processors() * _best_rate(device, dtype, alone=True)
    return _best_rate(device, dtype, alone=False)


def neighbours() -> str | None:
    """One line for the user where other programs keep this machine's processors busy; None where all is well.

    PyTorch's threads wait for one another at every operation, at full speed, also for those that do not run at all.
    """
    if not hasattr(os, "getloadavg") or "OMP_WAIT_POLICY" in os.environ or torch.get_num_threads() == 1:
        return None
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load < processors:
        return None
    return (
        f"other programs keep {load:.1f} of this machine's {processors} processors busy: set OMP_WAIT_POLICY=passive, "
        "so that waiting threads make room, or OMP_NUM_THREADS=1"
    )


def _processors() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), available)


def _best_rate(device: torch.device, dtype: torch.dtype, alone: bool) -> float:
    """The best rate; `alone`: of one thread, by the time that it was given."""
    threads, clock = torch.get_num_threads(), time.thread_time if alone else time.perf_counter
    if alone:
        torch.set_num_threads(1)
    try:
        a = torch.ones(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=dtype)
        best, deadline = float("inf"), time.perf_counter() + SECONDS
        while best == float("inf") or time.perf_counter() < deadline:
            best = min(best, _seconds_of_product(a, clock))
    finally:
        torch.set_num_threads(threads)
    return 2.0 * MATRIX_SIZE**3 / best


def _seconds_of_product(a: torch.Tensor, clock: Callable[[], float], repeats: int = 4) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    begin = clock()
    for _ in range(repeats):
        a @ a
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return (clock() - begin) / repeats
