"""Sums of losses over predictions, by position in the document and the like, and what is reported of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
class Ranges(ABC):
    """Scores by a number that each prediction has: bucket i of `buckets` covers `bounds(i)`, from the first up to, not
    including, the second."""

    buckets: list[Score] = field(default_factory=list)

    @abstractmethod
    def index(self, number: int) -> int:
        """The bucket of a number."""

    @abstractmethod
    def bounds(self, index: int) -> tuple[int, int]:
        """First number of a bucket, and the first after it."""

    def number(self, position: int) -> int:
        """The number of a prediction by the position that `add_losses` counts."""
        return position

    @property
    def total(self) -> Score:
        """All buckets together."""
        total = Score()
        for bucket in self.buckets:
            total.add(bucket)
        return total

    def add(self, other: Ranges) -> None:
        """Count the other's predictions too."""
        while len(self.buckets) < len(other.buckets):
            self.buckets.append(Score())
        for mine, theirs in zip(self.buckets, other.buckets, strict=False):
            mine.add(theirs)

    def add_losses(self, first: int, losses: np.ndarray, sizes: np.ndarray | None) -> None:
        """Count predictions at positions `first`, `first + 1`, ...: losses [n] in nats, sizes [n] in bytes."""
        position, end = first, first + len(losses)
        while position < end:
            number = self.number(position)
            index = self.index(number)
            stop = min(end, position + self.bounds(index)[1] - number)
            part = slice(position - first, stop - first)
            while len(self.buckets) <= index:
                self.buckets.append(Score(bytes=None if sizes is None else 0))
            size = None if sizes is None else int(sizes[part].sum())
            self.buckets[index].add(Score(stop - position, float(losses[part].sum()), size))
            position = stop

    def report(self) -> list[dict[str, float | int | None]]:
        """One entry a bucket, `from` the first number up to, not including, `to`."""
        ranges = map(self.bounds, range(len(self.buckets)))
        return [
            {"from": first, "to": stop, **bucket.report()}
            for (first, stop), bucket in zip(ranges, self.buckets, strict=True)
        ]


@dataclass
class Positions(Ranges):
    """Scores by position in the document of the token that is predicted."""

    def index(self, number: int) -> int:
        return bucket_index(number)

    def bounds(self, index: int) -> tuple[int, int]:
        return bucket_range(index)


class Places(Ranges):
    """Scores by place in the chunk of the token that predicts, in up to `PARTS` equal parts of the chunk: the first
    token of a chunk attends to itself alone."""

    PARTS = 16

    def __init__(self, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size, self.width = chunk_size, -(-chunk_size // self.PARTS)

    def number(self, position: int) -> int:
        return position % self.chunk_size

    def index(self, number: int) -> int:
        return number // self.width

    def bounds(self, index: int) -> tuple[int, int]:
        return index * self.width, min(self.chunk_size, (index + 1) * self.width)


class Distances(Ranges):
    """Scores by how many tokens were read since the state was cut, in buckets [0, 16), [16, 32), [32, 64), ..."""

    FIRST = 16

    def __init__(self, reset_every: int) -> None:
        super().__init__()
        self.reset_every = reset_every

    def number(self, position: int) -> int:
        return position % self.reset_every

    def index(self, number: int) -> int:
        return (number // self.FIRST).bit_length()

    def bounds(self, index: int) -> tuple[int, int]:
        first = self.FIRST << (index - 1) if index else 0
        return first, min(self.reset_every, self.FIRST << index)


def bucket_index(position: int) -> int:
    """The bucket of a token at this position of its document, counted from 0."""
    return (position // FIRST_BUCKET).bit_length()


def bucket_range(index: int) -> tuple[int, int]:
    """First position of a bucket, and the first after it."""
    return (FIRST_BUCKET << (index - 1) if index else 0), FIRST_BUCKET << index
