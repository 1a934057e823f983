"""The losses by which new mixers learn from attention, as functions of tensors alone.

Each names its paper; where paper and code differ, the value is the code's. They are computed in float32, or in float64
for float64 input. What is `wanted` gets no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops.backend import full_precision

LEAST = 1e-12
"""A weight of attention below it counts as it."""

IGNORED = -100
"""The label of a token that has none."""


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x.to(full_precision(x.dtype))


def row_cross_entropy(rows: Tensor, wanted: Tensor) -> Tensor:
    """Hedgehog's (2402.04347): `-sum_j p_tj log a_tj`, the mean over batch, heads and queries.

    Args:
        rows: [B, H, L, L]; the student's weights a, each row of sum 1.
        wanted: likewise; the teacher's p.
    """
    return -(wide(wanted).detach() * wide(rows).clamp(min=LEAST).log()).sum(-1).mean()


def attention_transfer(heads: Tensor, wanted: Tensor, factor: float = 1000.0) -> Tensor:
    """LoLCATs' (2410.10254): `factor` times the mean square of the difference between the outputs of heads
    [B, L, H, d], before the output projection."""
    return factor * F.mse_loss(wide(heads), wide(wanted).detach())


def squared_distance(heads: Tensor, wanted: Tensor) -> Tensor:
    """Lizard's (2507.09025): the squared Frobenius norm of the difference [B, L, H, d], the mean over the batch."""
    return (wide(heads) - wide(wanted).detach()).square().flatten(1).sum(1).mean()


def matrix_distance(mixing: Tensor, attention: Tensor) -> Tensor:
    """MOHAWK's first stage (2408.10189): the Frobenius norm of the difference of [B, H, L, L], not squared, the mean
    over batch and heads."""
    return torch.linalg.matrix_norm(wide(mixing) - wide(attention).detach()).mean()


def hidden_distance(output: Tensor, wanted: Tensor) -> Tensor:
    """MOHAWK's second stage: the Euclidean norm over channels of the difference of [B, L, D], not squared, the mean
    over batch and tokens."""
    return torch.linalg.vector_norm(wide(output) - wide(wanted).detach(), dim=-1).mean()


def soft_cross_entropy(logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """MOHAWK's third stage: cross-entropy against the teacher's distribution, the mean over tokens that have a label.

    Args:
        logits, wanted: [B, L, V]; the student's and the teacher's.
        labels: int64 [B, L], -100 where there is none.
    """
    own, theirs = _labelled(logits, labels), _labelled(wanted, labels).detach()
    return -(theirs.softmax(-1) * own.log_softmax(-1)).sum(-1).mean()


def divergence(logits: Tensor, wanted: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The distillation study's (2504.14366): KL(teacher || student) of logits [B, L, V] over a temperature, times its
    square, the mean over tokens that have a label [B, L]."""
    own, theirs = _labelled(logits, labels) / temperature, _labelled(wanted, labels).detach() / temperature
    return temperature**2 * F.kl_div(
        own.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels [B, L], already shifted, the mean over those that there are."""
    return F.cross_entropy(wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean square of the logarithm of softmax's denominator, over tokens that have a label: SUPRA's code adds
    1e-4 times it to `next_token`."""
    return _labelled(logits, labels).logsumexp(-1).square().mean()


def alignment(states: tuple[Tensor, ...], wanted: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The distillation study's: the mean square of the difference of hidden states [B, L, D], over layers, channels and
    tokens that have a label, in units of the mean square of the teacher's in a layer."""
    found = []
    for own, theirs in zip(states, wanted, strict=True):
        there = _labelled(theirs, labels).detach()
        found.append((_labelled(own, labels) - there).square().mean() / there.square().mean().clamp(min=LEAST))
    return torch.stack(found).mean()


def _labelled(x: Tensor, labels: Tensor) -> Tensor:
    """[n, C]: what x [B, L, C] has where there is a label."""
    return wide(x[labels != IGNORED])
