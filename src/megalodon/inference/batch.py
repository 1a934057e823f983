"""Many prompts from a file: answered through the engine, written in order, resumed where it stopped.

Each line of the input is a JSON object like the body of a completion request; each line of the output holds what came
of the line of the same number. Lines are written whole and in order, so what the output has is done, and the rest is
left to do.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
                self.result = {"id": self.line.id, "choices": choices, "usage": counts}
            case Failed(failure, message):
                self.result = {"id": self.line.id, "error": {"code": failure.value, "message": message}}


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
        ValueError: for a line that is not as it should be, or an output that has more lines than the input.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    total = sum(1 for _ in _lines(source, engine))
    done = _written(target)
    if done > total:
        raise ValueError(f"{target} has {done} lines, {source} has {total}: it is the output of another input")
    if on_line is not None:
        on_line(done)
    waiting: dict[int, _Answer] = {}
    finished: queue.Queue[int] = queue.Queue()
    with target.open("ab") as output:
        lines = ((number, line) for number, line in enumerate(_lines(source, engine)) if number >= done)
        pending = next(lines, None)
        while pending is not None or waiting:
            while pending is not None and len(waiting) < min(AHEAD * engine.slots, engine.queue_length):
                number, line = pending
                waiting[number] = _submit(engine, line, number, seed, finished)
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


def count_lines(source: Path) -> int:
    """Lines of the input that are not blank."""
    with source.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _submit(engine: Engine, line: Line, number: int, seed: int, finished: queue.Queue[int]) -> _Answer:
    answer = _Answer(line)

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


def _written(target: Path) -> int:
    """Whole lines in the output; what follows the last one is cut off."""
    if not target.exists():
        return 0
    with target.open("rb+") as file:
        count = end = 0
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            count, end = count + 1, end + len(raw)
        file.truncate(end)
    return count
