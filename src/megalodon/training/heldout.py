"""The loss on held-out documents, in nats per token and, where tokens map to bytes, in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from megalodon.data import Batch
from megalodon.training.step import autocast, forward_loss


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean over `num_targets` tokens: `loss` in nats per token, `bits_per_byte` of the text they stand for, or None."""

    loss: float
    bits_per_byte: float | None
    num_targets: int

    def __str__(self) -> str:
        compressed = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f}{compressed}"


@torch.no_grad()
def measure_heldout(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: str,
    stop: Callable[[], bool] = lambda: False,
) -> HeldOutLoss | None:
    """Read the batches in order, carrying states where rows go on. None if `stop` said so before the end.

    Draws nothing from any generator, and leaves the model in the mode that it was in.

    Raises:
        ValueError: if the batches hold no target.
    """
    training = model.training
    model.eval()
    nats, num_targets, num_bytes, state = 0.0, 0, 0, None
    bytes_known = True
    try:
        for batch in batches:
            if stop():
                return None
            with autocast(device, precision):
                loss, state = forward_loss(model, batch.to(device), state, divisor=1)
            nats += float(loss)
            num_targets += batch.num_tokens
            bytes_known &= batch.num_bytes is not None
            num_bytes += batch.num_bytes or 0
    finally:
        model.train(training)
    if not num_targets:
        raise ValueError("the held-out set is too small: it has no token to predict")
    bits_per_byte = nats / math.log(2) / num_bytes if bytes_known and num_bytes else None
    return HeldOutLoss(nats / num_targets, bits_per_byte, num_targets)
