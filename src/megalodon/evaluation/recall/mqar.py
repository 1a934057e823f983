"""Multi-query associative recall, with the arrays of Zoology's generator (arXiv 2312.04927)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from megalodon.evaluation.recall.questions import NOT_ASKED, Questions, Segment, questions, without_return


class MQAR(Segment):
    """Keys and values, `k1 v1 k2 v2 ...`; later each key stands again, once, and its value is asked for there.

    Keys are of the lower half of the vocabulary without 0, values of the upper. A key's second place is one of the even
    places after the pairs, drawn with probability proportional to `(g + 1) ** (power - 1)` for the g-th.
    """

    TOLD: ClassVar[tuple[str, ...]] = ("length", "pairs")

    vocab_size: int = Field(default=8192, ge=4)
    length: int = Field(ge=2, description="tokens of a row")
    pairs: int = Field(ge=1, description="keys, and as many values")
    power: float = Field(default=0.01, gt=0, description="1: second places are uniform; near 0: most are early")
    filler: bool = Field(default=True, description="random tokens at the other places, in place of 0")

    @property
    def tokens(self) -> int:
        return self.vocab_size

    @property
    def row_length(self) -> int:
        return self.length

    def problems(self) -> list[str]:
        found = []
        if self.length % 2:
            found.append(f"length: {self.length} must be even")
        if 4 * self.pairs > self.length:
            found.append(f"pairs: {self.pairs} need a length of {4 * self.pairs} or more, not {self.length}")
        if self.pairs > self.vocab_size // 2 - 1:
            found.append(f"pairs: {self.pairs} keys are more than a vocab_size of {self.vocab_size} has")
        return found

    def draw(self, seed: int) -> Questions:
        """Zoology's rows for the seed. Fillers are drawn by PyTorch's generator from seed + 1: Zoology takes them from
        the global one, which making the model has moved on."""
        generator, rows, half = np.random.RandomState(seed), self.examples, self.vocab_size // 2
        keys = without_return(generator, np.arange(1, half), rows, self.pairs)
        values = without_return(generator, np.arange(half, self.vocab_size), rows, self.pairs)
        context = 2 * self.pairs
        slots = (self.length - context) // 2
        odds = self.power * np.arange(1, slots + 1) ** (self.power - 1)
        places = context + 2 * without_return(generator, slots, rows, self.pairs, odds / odds.sum())
        inputs = np.zeros((rows, self.length), dtype=np.int64)
        labels = np.full_like(inputs, NOT_ASKED)
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(labels, places, values, 1)
        made = questions(inputs, labels)
        if not self.filler:
            return made
        noise = torch.randint(self.vocab_size, made.inputs.shape, generator=torch.Generator().manual_seed(seed + 1))
        return Questions(torch.where(made.inputs == 0, noise, made.inputs), made.labels)
