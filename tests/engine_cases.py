"""A small model, and a caller of the engine that collects what a request gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megalodon import MegalodonConfig, MegalodonForCausalLM
from megalodon.data import ByteTokenizer
from megalodon.inference.engine import Engine
from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Delta, Done, Ended, Event, Failed, Generation, Progress, Request
from megalodon.inference.sampling import Sampling
from megalodon.inference.snapshot import Snapshot
from megalodon.inference.work import Work

CHUNK = 16


def make_model(dtype: torch.dtype = torch.float32, **changes: object) -> MegalodonForCausalLM:
    torch.manual_seed(0)
    fields = {"num_layers": 2, "model_dim": 32, "z_dim": 16, "value_dim": 32, "num_heads": 2, "ffn_hidden_dim": 32}
    rest = {"vocab_size": 256, "cema_ndim": 4, "chunk_size": CHUNK, "norm_num_groups": 4}
    return MegalodonForCausalLM(MegalodonConfig(**{**fields, **rest, **changes})).eval().to(dtype)


def make_engine(model: MegalodonForCausalLM | None = None, **options: object) -> Engine:
    return Engine(model or make_model(), ByteTokenizer(), **{"slots": 16, "piece": CHUNK, **options})


def text_tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 128, length)


@dataclass
class Call:
    """A request and what came of it."""

    request: Request
    events: list[Event] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return any(isinstance(event, Done | Failed) for event in self.events)

    @property
    def failed(self) -> Failed | None:
        return next((event for event in self.events if isinstance(event, Failed)), None)

    @property
    def usage(self):
        return next(event for event in self.events if isinstance(event, Done)).usage

    @property
    def snapshot(self) -> Snapshot:
        kept = [event.snapshot for event in self.events if isinstance(event, Ended | Done) and event.snapshot]
        return kept[0]

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]

    def tokens(self, choice: int = 0) -> list[tuple[int, float | None]]:
        """(id, log-probability) of each token: comparing these compares logits to the bit."""
        return [
            (token.token, token.logprob)
            for event in self.events
            if isinstance(event, Delta) and event.choice == choice
            for token in event.tokens
        ]

    def text(self, choice: int = 0) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta) and event.choice == choice)


def submit(
    engine: Engine,
    tokens: np.ndarray | TokenFeed | None = None,
    start: Snapshot | None = None,
    owner: str = "a",
    keep: bool = False,
    read_only: bool = False,
    seconds: float | None = None,
    max_prompt_tokens: int | None = None,
    **generation: object,
) -> Call:
    """Submit a request; log-probabilities are always asked for and the end of a document ignored."""
    feed = tokens if isinstance(tokens, TokenFeed) else TokenFeed(np.array([], np.int64) if tokens is None else tokens)
    options = {"sampling": Sampling(0.9), "seed": 1, "logprobs": 0, "ignore_end": True, **generation}
    call: Call
    request = Request(
        owner,
        start,
        feed,
        None if read_only else Generation(**options),
        lambda event: call.events.append(event),
        keep,
        max_prompt_tokens,
        seconds,
    )
    call = Call(request)
    engine.submit(request)
    return call


def run(engine: Engine, *calls: Call, steps: int = 10_000) -> Call:
    """Step until all calls are done; the first one."""
    for _ in range(steps):
        if all(call.done for call in calls):
            return calls[0]
        engine.step()
    raise AssertionError(f"not done after {steps} steps")


def reads(
    engine: Engine,
    tokens: np.ndarray | TokenFeed,
    max_tokens: int | None = None,
    choices: int = 1,
    start: Snapshot | None = None,
) -> tuple[Work, list[Event]]:
    """Work that is being read by the engine's part for it, without its thread or schedule, and its events."""
    events: list[Event] = []
    generation = None if max_tokens is None else Generation(max_tokens, Sampling(0), 1, choices=choices)
    feed = tokens if isinstance(tokens, TokenFeed) else TokenFeed(tokens)
    work = Work(Request("a", start, feed, generation, events.append, keep=choices == 1), engine.counters)
    engine.reading.add(work)
    return work, events
