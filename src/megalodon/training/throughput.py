"""Model FLOP utilisation: what a training step must compute, beside what this machine's matrix products reach."""

from __future__ import annotations

import time

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
    """FLOP/s of square matrix products of 1024 in `dtype` on `device`: the best of a third of a second's worth."""
    a = torch.ones(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        best = min(best, _seconds_of_product(a))
    return 2.0 * MATRIX_SIZE**3 / best


def _seconds_of_product(a: torch.Tensor, repeats: int = 4) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    begin = time.perf_counter()
    for _ in range(repeats):
        a @ a
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return (time.perf_counter() - begin) / repeats
