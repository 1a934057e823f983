"""Joint recall: a value for each pair of a context and a key, with the arrays of HAX's generator."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from megalodon.evaluation.recall.questions import NOT_ASKED, Questions, Segment, questions

BEGIN, PAD, SEPARATOR, SPECIAL = 1, 3, 4, 10


class JointRecall(Segment):
    """A table is read once, context by context, keys in a fresh random order; then once more, in other orders, and at
    every key its value is asked for. The same key has another value in another context.

    Ids: 10 for special tokens, then values, keys, contexts. Rows are padded to the length of the largest table.
    """

    TOLD: ClassVar[tuple[str, ...]] = ("contexts", "keys")

    contexts: int = Field(ge=1)
    keys: int = Field(ge=1)
    values: int = Field(default=16, ge=2, description="that an entry may have")
    max_contexts: int = Field(default=16, ge=1, description="of any segment: it decides ids and length")
    max_keys: int = Field(default=16, ge=1)

    @property
    def tokens(self) -> int:
        return SPECIAL + self.values + self.max_keys + self.max_contexts

    @property
    def row_length(self) -> int:
        return 2 * self.max_contexts * (1 + 2 * self.max_keys) + 2

    def problems(self) -> list[str]:
        return [
            f"{name}: {value} must be at most max_{name} ({most})"
            for name, value, most in (
                ("contexts", self.contexts, self.max_contexts),
                ("keys", self.keys, self.max_keys),
            )
            if value > most
        ]

    def draw(self, seed: int) -> Questions:
        generator = np.random.RandomState(seed)
        inputs = np.full((self.examples, self.row_length), PAD, dtype=np.int64)
        labels = np.full_like(inputs, NOT_ASKED)
        first_key = SPECIAL + self.values
        for row, asked in zip(inputs, labels, strict=True):
            table = generator.randint(0, self.values, (self.contexts, self.keys)) + SPECIAL
            row[0], place = BEGIN, 1
            for half in range(2):
                for context in generator.permutation(self.contexts):
                    row[place], place = first_key + self.max_keys + context, place + 1
                    order = generator.permutation(self.keys)
                    stop = place + 2 * self.keys
                    row[place:stop:2], row[place + 1 : stop : 2] = first_key + order, table[context, order]
                    if half:
                        asked[place:stop:2] = table[context, order]
                    place = stop
                if not half:
                    row[place], place = SEPARATOR, place + 1
        return questions(inputs, labels)
