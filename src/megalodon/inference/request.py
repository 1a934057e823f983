"""What is asked of the engine, and what it answers: requests, events, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from megalodon.inference.feed import TokenFeed
from megalodon.inference.guidance import Grammar
from megalodon.inference.hidden import TokenChoice, Watch
from megalodon.inference.sampling import Sampling
from megalodon.inference.snapshot import Snapshot

MOST_PENALTY = 100.0
MOST_BIAS = 100.0


@dataclass(frozen=True)
class Generation:
    """How a text is continued.

    Attributes:
        max_tokens: end after so many; 1 or more.
        min_tokens: until there are so many, no end of document, stop token or stop string ends it; with `ignore_end`
            an end of document may be chosen before, and ends nothing.
        sampling: how tokens are chosen.
        frequency_penalty: taken from a token's logit for each time that this continuation has it already.
        presence_penalty: likewise, once.
        logit_bias: (token, what is added to its logit), each token once.
        grammar: the form that the text must have; when it is complete, the continuation ends.
        seed: of the random generator; choice i of several draws from a stream of its own. None: the snapshot's
            generator goes on with `resume_generator`, otherwise a random seed.
        resume_generator: without a seed, go on drawing where the snapshot stopped.
        choices: how many continuations.
        stop: end before any of these strings.
        stop_tokens: end when one of these is chosen, which is then no part of the text.
        ignore_end: go on after the end of a document.
        logprobs: give log-probabilities, and those of so many likeliest tokens; None gives none. They are the model's
            own, before penalties, bias, grammar and sampling.
        tell_end: give the token that ended the text among the others, although it is no part of the text.
    """

    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    resume_generator: bool = False
    choices: int = 1
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    stop_tokens: frozenset[int] = frozenset()
    tell_end: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a number out of range or an empty stop string."""
        for name, least in (("max_tokens", 1), ("choices", 1), ("min_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}; it must be 0 or more")
        if not all(self.stop):
            raise ValueError("stop: a stop string is empty; give at least one character")
        for name in ("frequency_penalty", "presence_penalty"):
            if not abs(getattr(self, name)) <= MOST_PENALTY:
                right = f"from {-MOST_PENALTY:g} to {MOST_PENALTY:g}; 0 is off"
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {right}")
        for token, value in self.logit_bias:
            if not (token >= 0 and abs(value) <= MOST_BIAS):
                raise ValueError(
                    f"logit_bias has {value} for token {token}; it must be from {-MOST_BIAS:g} to {MOST_BIAS:g}"
                )
        if self.grammar is not None and self.min_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; where a form is to be kept to, that decides the length")


class FinishReason(StrEnum):
    """Why a continuation ended: its own end or a stop string; max_tokens; or it was ended from outside."""

    stop = "stop"
    length = "length"


@dataclass(frozen=True)
class Progress:
    """So many tokens of the sequence have been read, of `arrived` known so far; `cached` of them from the cache.

    `state_bytes` is what is remembered of them.
    """

    read: int
    arrived: int
    cached: int
    state_bytes: int


@dataclass(frozen=True)
class Delta:
    """What one continuation gained: text that may be shown, and the tokens since the last delta."""

    choice: int
    text: str
    tokens: tuple[TokenChoice, ...]


@dataclass(frozen=True)
class Ended:
    """One continuation is complete. `snapshot` is where it stands, if it was asked for."""

    choice: int
    reason: FinishReason
    snapshot: Snapshot | None


@dataclass(frozen=True)
class Usage:
    """Tokens of the sequence before generation, those of them that were cached, and those generated in all."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Done:
    """The request is complete. `snapshot` is that of the text read, for a request that generates nothing."""

    usage: Usage
    snapshot: Snapshot | None


class Failure(StrEnum):
    """Why a request failed."""

    cancelled = "cancelled"
    timeout = "timeout"
    empty = "empty"
    too_long = "too_long"
    form = "form"
    stopping = "stopping"
    internal = "internal"


@dataclass(frozen=True)
class Failed:
    """The request ended without completing; nothing follows. `field`: what in the request is at fault, if known."""

    failure: Failure
    message: str
    field: str | None = None


Event: TypeAlias = "Progress | Delta | Ended | Done | Failed"
Listener: TypeAlias = Callable[[Event], None]


class QueueFullError(RuntimeError):
    """More requests are waiting than the engine accepts."""


class StoppingError(RuntimeError):
    """The engine accepts no more requests."""


@dataclass
class Request:
    """One piece of work.

    Attributes:
        owner: whose it is: queues are served in turn by owner, and cached prefixes belong to one.
        start: the sequence to go on from; None for a new one.
        feed: the text to read first.
        generation: how to continue; None only reads.
        listener: called with each event, from the engine's thread: it must not block.
        keep: give snapshots with the events that carry them.
        max_prompt_tokens: fail when the text turns out longer; None for any length.
        seconds: fail when it is not complete after so long; None for no limit.
        watch: looks at the hidden states of all of the text, none of which is then taken from the cache. What it found
            is there when the first `Delta` or `Done` comes.
    """

    owner: str
    start: Snapshot | None
    feed: TokenFeed
    generation: Generation | None
    listener: Listener
    keep: bool = False
    max_prompt_tokens: int | None = None
    seconds: float | None = None
    watch: Watch | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give up: the engine frees what it holds before its next step. May be called at any time, more than once."""
        self.cancelled.set()
        self.feed.abandon()
