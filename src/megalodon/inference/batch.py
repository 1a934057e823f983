"""Many prompts from a file: answered through the engine, written in order, resumed where it stopped.

Each line of the input is a JSON object like the body of a completion request; each line of the output holds what came
of the line of the same number. Lines are written whole and in order, so what the output has is done, and the rest is
left to do. Each says which line it answers (`request`, a hash), so that an input or seed that has changed is noticed.
`serving.offline` does the same for OpenAI's batch files.
"""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalodon.inference.engine import Engine
from megalodon.inference.feed import TokenFeed
from megalodon.inference.request import Delta, Done, Ended, Event, Failed, Generation, Request
from megalodon.inference.sampling import Sampling

AHEAD = 4
"""Lines in the engine or waiting to be written, for each slot."""


class Line(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    id: str | int | None = None
    max_tokens: int = Field(256, ge=1)
    n: int = Field(1, ge=1)
    seed: int | None = None
    stop: list[str] = []
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def generation(self, seed: int) -> Generation:
        """How it is to be continued; `seed` where the line gives none."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        own = seed if self.seed is None else self.seed
        return Generation(self.max_tokens, sampling, own, choices=self.n, stop=tuple(self.stop))


@dataclass
class _Answer:
    line: Line
    request: str
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    result: dict[str, Any] | None = None

    def note(self, event: Event) -> None:
        match event:
            case Delta(choice, text, _):
                self.texts[choice] = self.texts.get(choice, "") + text
            case Ended(choice, reason, _):
                self.reasons[choice] = reason.value
            case Done(usage, _):
                choices = [
                    {"text": self.texts.get(choice, ""), "finish_reason": reason}
                    for choice, reason in sorted(self.reasons.items())
                ]
                counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
                self.result = {"id": self.line.id, "request": self.request, "choices": choices, "usage": counts}
            case Failed(failure, message):
                error = {"code": failure.value, "message": message}
                self.result = {"id": self.line.id, "request": self.request, "error": error}


def run_batch(
    engine: Engine, source: Path, target: Path, seed: int = 0, on_line: Callable[[int], None] | None = None
) -> int:
    """Answer the lines of `source` that `target` does not have yet.

    Args:
        engine: started; it should have nothing else to do.
        source: JSONL; see `Line`. All of it is checked before anything is generated.
        target: JSONL; made if it does not exist, gone on with if it does. Half a line at its end, as a kill may leave
            it, is removed.
        seed: with the line's number, that of lines without one of their own, so that a run can be repeated.
        on_line: called with the number of lines done so far.

    Returns:
        How many lines the output has.

    Raises:
        FileNotFoundError: if there is no `source`.
        ValueError: for a line that is not as it should be, an output of another input or seed, or one that another run
            is writing.
    """
    with writing(source, target):
        total = sum(1 for _ in _lines(source, engine))
        done = written(target, requests_of(source, seed), total, lambda answer: answer["request"])
        if on_line is not None:
            on_line(done)
        return _answer(engine, source, target, seed, done, on_line)


def _answer(
    engine: Engine, source: Path, target: Path, seed: int, done: int, on_line: Callable[[int], None] | None
) -> int:
    waiting: dict[int, _Answer] = {}
    finished: queue.Queue[int] = queue.Queue()
    with target.open("ab") as output:
        asked = enumerate(zip(_lines(source, engine), requests_of(source, seed), strict=True))
        lines = ((number, line, request) for number, (line, request) in asked if number >= done)
        pending = next(lines, None)
        while pending is not None or waiting:
            while pending is not None and len(waiting) < min(AHEAD * engine.slots, engine.queue_length):
                number, line, request = pending
                waiting[number] = _submit(engine, line, number, seed, request, finished)
                pending = next(lines, None)
            finished.get()
            while done in waiting and (result := waiting[done].result) is not None:
                output.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
                output.flush()
                del waiting[done]
                done += 1
                if on_line is not None:
                    on_line(done)
    return done


@contextmanager
def writing(source: Path, target: Path) -> Iterator[None]:
    """Have the output for oneself.

    Raises:
        FileNotFoundError: if there is no `source`.
        ValueError: if another run is writing `target`.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise ValueError(f"{target} is being written by another run: wait for it, or give another output") from None


def requests_of(source: Path, seed: int) -> Iterator[str]:
    """What tells each line of the input from any other: a hash of its bytes, its number and the run's seed."""
    number = 0
    with source.open("rb") as file:
        for raw in file:
            if raw.strip():
                yield hashlib.sha256(f"{number} {seed} ".encode() + raw.strip()).hexdigest()[:24]
                number += 1


def written(target: Path, requests: Iterable[str], total: int, request_of: Callable[[Any], str]) -> int:
    """Whole lines in the output, each of which answers the input's line of its number; half a line is cut off.

    Raises:
        ValueError: for a line that answers another input or seed, or more lines than the input has (`total`).
    """
    if not target.exists():
        return 0
    expected, count, end = iter(requests), 0, 0
    with target.open("rb+") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                same = request_of(json.loads(raw)) == next(expected, None)
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise ValueError(
                    f"{target}:{count + 1} answers no line {count + 1} of this input ({total} lines, this seed): it "
                    "is that of another input, or the input has changed; give another output"
                )
            count, end = count + 1, end + len(raw)
        file.truncate(end)
    return count


def count_lines(source: Path) -> int:
    """Lines of the input that are not blank."""
    with source.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _submit(engine: Engine, line: Line, number: int, seed: int, request: str, finished: queue.Queue[int]) -> _Answer:
    answer = _Answer(line, request)

    def listen(event: Event) -> None:
        answer.note(event)
        if answer.result is not None:
            finished.put(number)

    tokens: np.ndarray = engine.tokenizer.encode(line.prompt)
    engine.submit(Request("batch", None, TokenFeed(tokens), line.generation(seed + number), listen))
    return answer


def _lines(source: Path, engine: Engine) -> Iterator[Line]:
    with source.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = Line.model_validate_json(raw)
                line.generation(0)
                if line.n > engine.slots:
                    raise ValueError(f"n is {line.n}; the engine has {engine.slots} slots")
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "the line"
                raise ValueError(f"{source}:{number}: {where}: {first['msg']}") from None
            except ValueError as error:
                raise ValueError(f"{source}:{number}: {error}") from None
            yield line
