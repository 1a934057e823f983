"""Sums of losses over predictions, by position in the document, and what is reported of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

FIRST_BUCKET = 1024
"""Positions are put in buckets [0, 1K), [1K, 2K), [2K, 4K), [4K, 8K), ..., each twice the one before."""


@dataclass
class Score:
    """Loss over some predictions, summed.

    Attributes:
        tokens: predictions.
        nats: their summed loss.
        bytes: of UTF-8 text that the predicted tokens stand for; None where the tokenizer cannot say.
    """

    tokens: int = 0
    nats: float = 0.0
    bytes: int | None = 0

    def add(self, other: Score) -> None:
        """Count the other's predictions too."""
        self.tokens += other.tokens
        self.nats += other.nats
        self.bytes = None if self.bytes is None or other.bytes is None else self.bytes + other.bytes

    def report(self) -> dict[str, float | int | None]:
        """tokens, bytes, loss (nats per token), perplexity (exp of loss) and bits per byte; None where undefined."""
        loss = self.nats / self.tokens if self.tokens else None
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 700.0)),  # 700: the largest that a double holds
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
        }


@dataclass
class Positions:
    """Scores by position: bucket i of `buckets` covers `bucket_range(i)`."""

    buckets: list[Score] = field(default_factory=list)

    @property
    def total(self) -> Score:
        """All buckets together."""
        total = Score()
        for bucket in self.buckets:
            total.add(bucket)
        return total

    def add(self, other: Positions) -> None:
        """Count the other's predictions too."""
        while len(self.buckets) < len(other.buckets):
            self.buckets.append(Score())
        for mine, theirs in zip(self.buckets, other.buckets, strict=False):
            mine.add(theirs)

    def add_losses(self, first: int, losses: np.ndarray, sizes: np.ndarray | None) -> None:
        """Count predictions of the tokens at `first`, `first + 1`, ...: losses [n] in nats, sizes [n] in bytes."""
        position, end = first, first + len(losses)
        while position < end:
            index = bucket_index(position)
            stop = min(end, bucket_range(index)[1])
            part = slice(position - first, stop - first)
            while len(self.buckets) <= index:
                self.buckets.append(Score(bytes=None if sizes is None else 0))
            size = None if sizes is None else int(sizes[part].sum())
            self.buckets[index].add(Score(stop - position, float(losses[part].sum()), size))
            position = stop

    def report(self) -> list[dict[str, float | int | None]]:
        """One entry a bucket, `from` the first position up to, not including, `to`."""
        ranges = map(bucket_range, range(len(self.buckets)))
        return [
            {"from": first, "to": stop, **bucket.report()}
            for (first, stop), bucket in zip(ranges, self.buckets, strict=True)
        ]


def bucket_index(position: int) -> int:
    """The bucket of a token at this position of its document, counted from 0."""
    return (position // FIRST_BUCKET).bit_length()


def bucket_range(index: int) -> tuple[int, int]:
    """First position of a bucket, and the first after it."""
    return (FIRST_BUCKET << (index - 1) if index else 0), FIRST_BUCKET << index
