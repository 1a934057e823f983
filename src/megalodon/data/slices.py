"""Splits as the datasets library writes them: `train`, `train[:10%]`, `train[100:200]+test[-50:]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

NUMBER = r"-?\d[\d_]*%?"
PART = re.compile(rf"(?P<name>\w+(?:[.-]\w+)*)(?P<slice>\[(?P<first>{NUMBER})?:(?P<stop>{NUMBER})?\])?")

Default = TypeVar("Default", bound=int | None)


@dataclass(frozen=True)
class SplitPart:
    """Rows `first` up to `stop` of a split, each as it was written (`10%`, `-50`) or None; `sliced` if any was."""

    name: str | None
    first: str | None = None
    stop: str | None = None
    sliced: bool = False

    @property
    def needs_length(self) -> bool:
        """Whether the rows can only be told from their number."""
        return any(bound is not None and ("%" in bound or "-" in bound) for bound in (self.first, self.stop))

    def rows(self, length: int | None) -> tuple[int, int | None]:
        """(first, stop) of a split of `length` rows; without a length, stop may lie past the end or be None.

        Percentages are rounded to the nearest row, as the datasets library does. Raises ValueError for a slice that the
        rows do not have, or that has no row.
        """
        first = _absolute(self.first, length, 0)
        stop = _absolute(self.stop, length, length)
        too_far = length is not None and (stop is None or stop > length or first > length)
        if first < 0 or too_far or (stop is not None and stop <= first):
            rows = "" if length is None else f" of {length:,} rows"
            raise ValueError(f"split {self}: there is no such slice{rows}")
        return first, stop

    def rows_of(self, length: int) -> tuple[int, int]:
        """`rows` of a split of known length."""
        first, stop = self.rows(length)
        return first, length if stop is None else stop

    def __str__(self) -> str:
        return f"{self.name}[{self.first or ''}:{self.stop or ''}]" if self.sliced else str(self.name)


def _absolute(bound: str | None, length: int | None, default: Default) -> int | Default:
    if bound is None:
        return default
    if bound.endswith("%"):
        assert length is not None
        percent = int(bound[:-1].replace("_", ""))
        if not -100 <= percent <= 100:
            raise ValueError(f"split: {bound} is more than all")
        number = round(percent * length / 100)
    else:
        number = int(bound.replace("_", ""))
    return number + length if number < 0 and length is not None else number


def split_parts(split: str) -> list[SplitPart]:
    """The parts of a split's description. Raises ValueError for what is none."""
    parts = []
    for written in split.split("+"):
        match = PART.fullmatch(written.strip())
        if match is None:
            raise ValueError(f"split is {split!r}: write a name, a slice such as train[:10%] or train[9:99], or a sum")
        parts.append(SplitPart(match["name"], match["first"], match["stop"], match["slice"] is not None))
    return parts
