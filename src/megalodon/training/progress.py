"""What a person sees of a run: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class StepReport:
    """The numbers shown for a step. `utilisation` is of the peak measured at the start, `seconds_left` an estimate."""

    step: int
    loss: float
    tokens_per_second: float
    utilisation: float
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  {self.tokens_per_second:,.0f} tokens/s  "
            f"{self.utilisation:.1%} of peak  {duration(self.seconds_left)} left"
        )


class Display(Protocol):
    """Where a run reports to."""

    def say(self, text: str) -> None:
        """Show a message that stays."""

    def show(self, report: StepReport) -> None:
        """Show where the run is."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LineDisplay:
    """Plain lines on standard output: messages at once, steps every few seconds and at the end."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._last = float("-inf")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, report: StepReport) -> None:
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES or report.step == self._total:
            self._last = now
            print(f"step {report.step}/{self._total}  {report}", flush=True)

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class BarDisplay:
    """A live bar at the foot of a terminal, messages above it."""

    def __init__(self, total_steps: int, console: Console) -> None:
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[report]}"),
            console=console,
        )
        self._total = total_steps
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, report: StepReport) -> None:
        if self._task is None:
            self._task = self._bar.add_task("training", total=self._total, report="")
        self._bar.update(self._task, completed=report.step, report=str(report))

    def __enter__(self) -> BarDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def make_display(total_steps: int) -> Display:
    """The display that suits standard output."""
    console = Console()
    return BarDisplay(total_steps, console) if console.is_terminal else LineDisplay(total_steps)


def duration(seconds: float) -> str:
    """Seconds as people write them: 42s, 3m07s, 2h05m, 3d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class StepClock:
    """Seconds per step, smoothed, of what was timed with `tick`; evaluation and saving are not timed."""

    def __init__(self) -> None:
        self._average: float | None = None

    def tick(self, seconds: float) -> float:
        """Take in a step's time and return the smoothed one."""
        self._average = seconds if self._average is None else 0.9 * self._average + 0.1 * seconds
        return self._average
