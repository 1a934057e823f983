"""A request in the engine, how it may be refused there, and what the engine counts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from megalodon.inference.continuation import Continuation
from megalodon.inference.reading import Reader
from megalodon.inference.request import Failure, Request
from megalodon.inference.snapshot import Kind


@dataclass
class Counters:
    """What the engine has done, for metrics. Written by its thread alone."""

    steps: int = 0
    read_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    waiting: int = 0
    reading: int = 0
    generating: int = 0
    failures: int = 0
    step_seconds: float = 0.0


@dataclass(eq=False)
class Work:
    """A request in the engine."""

    request: Request
    deadline: float
    reader: Reader | None = None
    slots_needed: int = 0
    replay: deque[tuple[Kind, int]] = field(default_factory=deque)
    replay_slot: int | None = None
    continuations: dict[int, Continuation] = field(default_factory=dict)  # by slot
    prompt_tokens: int = 0
    generated: int = 0
    reserved: int = 0  # slots that it may still take

    @property
    def not_read_again(self) -> int:
        """Tokens of the sequence whose state was there already: in the snapshot it began with, or in the cache."""
        assert self.reader is not None
        return self.reader.cached + (0 if self.request.start is None else self.request.start.position)


class RefusedError(Exception):
    """A request that cannot be done, and why."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure
