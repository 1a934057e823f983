"""What a person sees of a comparison: what runs, how far each is, and the time that is left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megalodon.training.progress import duration

if TYPE_CHECKING:
    from megalodon.comparison.plan import Plan, Records
    from megalodon.comparison.runner import Running

SECONDS_BETWEEN_LINES = 10.0
TAIL = 4096


@dataclass(frozen=True)
class Outlook:
    """Where a comparison stands: jobs `done` of those `known` so far, a line for each that runs, and seconds left."""

    done: int
    known: int
    running: tuple[str, ...]
    seconds_left: float | None

    @staticmethod
    def of(plan: Plan, records: Records, running: Sequence[Running], at_once: int) -> Outlook:
        """Of a plan. The time left counts each architecture's own seconds a step, and the scores at what the finished
        ones took; None until the speeds are measured."""
        wanted = plan.wanted(records)
        seconds = {name: plan.seconds_a_step(name, records) for name in plan.names}
        left: float | None = None
        steps_made: dict[str, int] = {}
        lines = []
        for each in running:
            job, note = each.job, ""
            if job.kind == "train":
                last = last_record(each.folder / "run" / "metrics.jsonl")
                step = 0 if last is None else last["step"]
                name = job.about["architecture"]
                steps_made[name] = steps_made.get(name, 0) + step
                note = f": step {step:,} of {job.about['steps']:,}"
                note += "" if last is None or "loss" not in last else f", loss {last['loss']:.3f}"
            lines.append(f"{job}{note}")
        if all(value is not None for value in seconds.values()):
            steps = plan.training_left(records)
            work = sum((seconds[name] or 0) * (steps[name] - steps_made.get(name, 0)) for name in plan.names)
            scores = [record["wall_seconds"] for record in records.values() if record["kind"] == "score"]
            purposes = 2 if plan.config.equal_time is not None else 1
            open_scores = max(0, len(plan.names) * len(plan.config.seeds) * purposes - len(scores))
            work += open_scores * (sum(scores) / len(scores) if scores else 0.0)
            left = max(0.0, work) / at_once
        return Outlook(sum(job.key in records for job in wanted), len(wanted), tuple(lines), left)

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", about {duration(self.seconds_left)} left"
        return f"{self.done} of {self.known} jobs done{left}"


class Progress:
    """A few live lines at the foot of a terminal; elsewhere a line every few seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        console = Console(stderr=True)
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self._say, self._last = say, 0.0

    def show(self, outlook: Outlook) -> None:
        """Show where the comparison stands."""
        if self._live is not None:
            self._live.update(Text("\n".join([*(f"  {line}" for line in outlook.running), str(outlook)])))
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._say("; ".join([str(outlook), *outlook.running]))

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def last_record(path: Path) -> dict[str, Any] | None:
    """The last whole line of a JSON-lines file that is being written; None where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().split(b"\n")[:-1]
        record: dict[str, Any] = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
    return record
