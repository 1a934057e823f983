"""Two small tasks of the state-space literature (arXiv 2312.00752): induction, and selective copying."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from megalodon.evaluation.recall.questions import NOT_ASKED, Questions, Segment, questions


class Induction(Segment):
    """Random tokens, among which a special one stands once, and again at the end: the token that followed it is asked.

    Ids 0 to vocab_size - 1 are the random tokens, vocab_size is the special one. Its first place is uniform over all
    that leave room for an answer.
    """

    vocab_size: int = Field(default=16, ge=2, description="random tokens")
    length: int = Field(default=256, ge=3)

    @property
    def tokens(self) -> int:
        return self.vocab_size + 1

    @property
    def row_length(self) -> int:
        return self.length

    def draw(self, seed: int) -> Questions:
        generator, rows = np.random.RandomState(seed), np.arange(self.examples)
        inputs = generator.randint(0, self.vocab_size, (self.examples, self.length))
        places = generator.randint(0, self.length - 2, self.examples)
        inputs[rows, places] = inputs[:, -1] = self.vocab_size
        labels = np.full_like(inputs, NOT_ASKED)
        labels[:, -1] = inputs[rows, places + 1]
        return questions(inputs, labels)


class SelectiveCopying(Segment):
    """A few tokens at random places among noise; then, at as many markers, they are asked for in their order.

    Ids: 0 noise, 1 marker, then the tokens to copy.
    """

    TOLD: ClassVar[tuple[str, ...]] = ("length", "copied")

    vocab_size: int = Field(default=16, ge=3, description="all ids, noise and marker among them")
    length: int = Field(default=4096, ge=1, description="tokens before the markers")
    copied: int = Field(default=16, ge=1)

    @property
    def tokens(self) -> int:
        return self.vocab_size

    @property
    def row_length(self) -> int:
        return self.length + self.copied

    def problems(self) -> list[str]:
        return [] if self.copied <= self.length else [f"copied: {self.copied} must be at most length ({self.length})"]

    def draw(self, seed: int) -> Questions:
        generator = np.random.RandomState(seed)
        chosen = generator.randint(2, self.vocab_size, (self.examples, self.copied))
        order = np.argsort(generator.random_sample((self.examples, self.length)), axis=1)
        places = np.sort(order[:, : self.copied], axis=1)
        inputs = np.zeros((self.examples, self.row_length), dtype=np.int64)
        np.put_along_axis(inputs, places, chosen, 1)
        inputs[:, self.length :] = 1
        labels = np.full_like(inputs, NOT_ASKED)
        labels[:, self.length :] = chosen
        return questions(inputs, labels)
