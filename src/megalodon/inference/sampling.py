"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty, by Transformers' processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

REPETITION_WINDOW = 256
"""The repetition penalty looks at the last so many tokens, prompt included: what is remembered must not grow."""
LEAST, MOST = 1e-5, 1e5
"""Logits are divided and multiplied by no less and no more, so that they stay finite in float32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's distribution as it is.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: keep only so many of the likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probability is at least this; 1 keeps all.
        min_p: keep tokens whose probability is at least this share of the likeliest one's; 0 keeps all.
        repetition_penalty: of tokens among the last `REPETITION_WINDOW`, positive logits are divided by it and
            negative ones multiplied; 1 does nothing.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        usable = f"{LEAST:g} to {MOST:g}"
        for name, right, good in (
            ("temperature", f"0 (greedy), or {usable}", self.temperature == 0 or LEAST <= self.temperature <= MOST),
            ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "more than 0 and at most 1 (off)", 0 < self.top_p <= 1),
            ("min_p", "0 (off) or more and less than 1", 0 <= self.min_p < 1),
            ("repetition_penalty", f"{usable}; 1 is off", LEAST <= self.repetition_penalty <= MOST),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {right}")

    def processors(self) -> LogitsProcessorList:
        """Transformers' processors for these settings, in the order in which its own `generate` applies them."""
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chosen.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature == 0:  # the likeliest token stays the likeliest whatever else is removed
            return chosen
        if self.temperature != 1:
            chosen.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k > 0:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p > 0:
            chosen.append(MinPLogitsWarper(float(self.min_p)))
        return chosen


def distribution(logits: Tensor, recent: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities from which the next token is drawn.

    Args:
        logits: [B, V], floating.
        recent: int64 [B, W], W at most `REPETITION_WINDOW`: the tokens that the repetition penalty looks at.
        sampling: the settings; with temperature 0 the whole probability is the likeliest token's.

    Returns:
        float32 [B, V], rows that sum to 1.

    Raises:
        ValueError: if logits are NaN or +inf, or all -inf.
    """
    scores = _scores(logits, recent, sampling)
    if sampling.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    return scores.softmax(-1)


def sample(
    logits: Tensor,
    recent: Tensor,
    sampling: Sampling,
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """The next token of each row: int64 [B], on the CPU.

    The draw is made on the CPU, by CPU generators, so that a seed means the same on every device. With one generator a
    row, what a row gives depends on that row alone. Greedy choices do not advance a generator. Arguments and errors as
    `distribution`.
    """
    scores = _scores(logits.cpu(), recent.cpu(), sampling)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    probabilities = scores.softmax(-1)
    if generators is None or isinstance(generators, torch.Generator):
        generators = [generators or torch.default_generator] * len(scores)
    # The likeliest of p / noise is a draw from p, as in torch.multinomial, which takes one generator for all rows.
    noise = [torch.empty_like(row).exponential_(generator=own) for row, own in zip(scores, generators, strict=True)]
    return (probabilities / torch.stack(noise)).argmax(-1)


def _scores(logits: Tensor, recent: Tensor, sampling: Sampling) -> Tensor:
    scores = sampling.processors()(cast(torch.LongTensor, recent), cast(torch.FloatTensor, logits.float()))
    if not (scores.amax(-1).isfinite().all() and not scores.isnan().any()):
        raise ValueError("the model's logits are not finite: its weights or its state are damaged")
    return scores
