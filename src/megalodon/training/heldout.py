"""The loss on held-out documents, in nats per token and, where the bytes of tokens are known, in bits per byte.

Both are those that `megalodon evaluate perplexity` gives for the same texts: the ids that end documents are not text,
and a document's first token has nothing to be predicted from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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


def combined(measured: Mapping[str, HeldOutLoss], weights: Mapping[str, float]) -> HeldOutLoss:
    """The loss on a mixture: the mean of its sources' losses, by their weights."""
    total = sum(weights[name] for name in measured)
    bits = [(weights[name], each.bits_per_byte) for name, each in measured.items() if each.bits_per_byte is not None]
    return HeldOutLoss(
        sum(weights[name] * each.loss for name, each in measured.items()) / total,
        sum(weight * value for weight, value in bits) / total if len(bits) == len(measured) else None,
        sum(each.num_targets for each in measured.values()),
    )


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
