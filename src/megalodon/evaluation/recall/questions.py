"""What every recall task makes: rows of tokens, and the answers that are asked for at some of their places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from megalodon.training.section import Section

NOT_ASKED = -100

SEED_LIMIT = 1 << 32


@dataclass(frozen=True)
class Questions:
    """inputs int64 [n, L]; labels int64 [n, L]: what the model must say after reading the token there, `NOT_ASKED`
    where nothing is asked."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, rows: int) -> Iterator[Questions]:
        """So many rows at a time, in order; the last batch may have fewer."""
        for inputs, labels in zip(self.inputs.split(rows), self.labels.split(rows), strict=True):
            yield Questions(inputs, labels)


class Segment(Section, ABC):
    """Rows of one kind. A task is a subclass: its fields are what its rows depend on."""

    TOLD: ClassVar[tuple[str, ...]] = ("length",)
    """Fields that tell segments of a task apart, for tables."""

    examples: int = Field(ge=1, description="rows")

    @abstractmethod
    def draw(self, seed: int) -> Questions:
        """The rows of this seed: always the same."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Ids that rows may hold: the smallest vocabulary."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """Tokens of a row."""

    def label(self) -> str:
        """What tells these rows from others of the task."""
        return ", ".join(f"{name} {getattr(self, name)}" for name in self.TOLD)

    def problems(self) -> list[str]:
        """What is wrong with the fields taken together, one sentence each."""
        return []


def segment_seeds(seed: int, train: int, test: int) -> tuple[list[int], list[int]]:
    """Zoology's seeds of the training and the test segments of one data seed: below 2^31, and from there to 2^32."""
    generator = np.random.RandomState(seed)
    below = generator.randint(0, SEED_LIMIT // 2, size=train)
    above = generator.randint(SEED_LIMIT // 2, SEED_LIMIT, size=test)
    return below.tolist(), above.tolist()


def without_return(generator: np.random.RandomState, values: Any, rows: int, count: int, p: Any = None) -> np.ndarray:
    """int64 [rows, count]: `count` of the values for each row, one after another, each at most once."""
    return np.stack([generator.choice(values, count, replace=False, p=p) for _ in range(rows)]).astype(np.int64)


def questions(inputs: np.ndarray, labels: np.ndarray) -> Questions:
    """From arrays."""
    return Questions(torch.from_numpy(inputs), torch.from_numpy(labels))
