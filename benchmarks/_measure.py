"""How the benchmarks measure: rounds that alternate their order, costs predicted before they are paid, peak memory.

Nothing here knows a model. A *workload* is prepared once (untimed) and then called; each call returns the seconds of
its phases, so what is timed is written where the work is (`_workloads.py`), and what is repeated is written here.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

Seconds = dict[str, float]  # phase -> seconds of one call
Timed = Callable[[], Seconds]

MAX_REPEATS = 64
FIRST_PROBE = 32  # the shortest length that is ever measured to predict longer ones
MEMORY_MARGIN = 0.9  # the share of the free memory that a workload may be predicted to need


@dataclass(frozen=True)
class Workload:
    """One thing to time. `prepare(length)` is untimed and returns the call whose phases are timed.

    `kind` and `contestant` name the workload's history: costs measured at one length predict those of the next.
    """

    contestant: str
    kind: str
    length: int
    prepare: Callable[[int], Timed]

    @property
    def history_key(self) -> tuple[str, str]:
        return self.kind, self.contestant


@dataclass(frozen=True)
class Cost:
    """What one call at one length took: preparing it and calling it in seconds, and the memory it added in bytes."""

    length: int
    prepare_seconds: float
    call_seconds: float
    bytes_added: int | None

    @property
    def total(self) -> float:
        return self.prepare_seconds + self.call_seconds


@dataclass(frozen=True)
class Sample:
    """The mean seconds of each phase over `repeats` calls in a row, in one round."""

    round: int
    repeats: int
    seconds: Seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Cell:
    """What became of one workload: its samples, or the reason why there are none."""

    contestant: str
    length: int
    status: str = "measured"  # or "skipped", "failed"
    reason: str = ""
    samples: list[Sample] = field(default_factory=list)
    peak_bytes_added: int | None = None


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated measurements."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


def alternating_order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: every other round moves the first place on, odd rounds run their predecessor backwards.

    Two names swap every round; with more, each name runs first and last equally often over 2 * len(names) rounds.
    """
    start = (round_index // 2) % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if round_index % 2 else rotated


def growth_exponent(points: Sequence[tuple[int, float]]) -> float:
    """The e of cost ~ length**e through the last two points, between 1 (linear) and 2 (quadratic in the length).

    The bounds keep fixed overheads at short lengths (e < 1) and noise (e > 2) from spoiling an extrapolation.
    """
    if len(points) < 2:
        return 1.0
    (length_a, cost_a), (length_b, cost_b) = points[-2:]
    if length_a == length_b or min(cost_a, cost_b) <= 0:
        return 1.0
    return min(2.0, max(1.0, math.log(cost_b / cost_a) / math.log(length_b / length_a)))


def extrapolate(points: Sequence[tuple[int, float]], length: int) -> float:
    """The cost expected at `length` from (length, cost) points in ascending length."""
    last_length, last_cost = points[-1]
    return last_cost * (length / last_length) ** growth_exponent(points)


def paired_ratios(slower: Sequence[Sample], faster: Sequence[Sample], phases: Sequence[str]) -> list[float]:
    """seconds(slower) / seconds(faster), round by round, over the rounds that both took part in.

    Pairing keeps a machine's drift out of the ratio, and makes a ratio of samples from two runs impossible by mistake:
    both lists must come from rounds that alternated.

    Raises:
        ValueError: no round has both.
    """
    by_round = {sample.round: sample for sample in faster}
    pairs = [(sample, by_round[sample.round]) for sample in slower if sample.round in by_round]
    if not pairs:
        raise ValueError("the two contestants share no round: a ratio needs samples that alternated in one run")
    return [phase_seconds(a, phases) / phase_seconds(b, phases) for a, b in pairs]


def phase_seconds(sample: Sample, phases: Sequence[str]) -> float:
    """Seconds of the named phases of one call."""
    return sum(sample.seconds[phase] for phase in phases)


def affordable_rounds(wanted: int, budget_seconds: float, prepare_seconds: float, call_seconds: float) -> int:
    """How many timed rounds fit into the budget beside preparing and one warm-up call; 0 means none."""
    return max(0, min(wanted, math.floor((budget_seconds - prepare_seconds) / max(call_seconds, 1e-9)) - 1))


class Meter:
    """Runs groups of workloads in alternating rounds within a budget of seconds per workload."""

    def __init__(
        self, rounds: int, budget_seconds: float, min_seconds: float, say: Callable[[str], None] = print
    ) -> None:
        self.rounds, self.budget_seconds, self.min_seconds, self.say = rounds, budget_seconds, min_seconds, say
        self.history: dict[tuple[str, str], dict[int, Cost]] = {}  # in ascending length

    def measure(self, workloads: dict[str, Workload]) -> dict[str, Cell]:
        """One group: every workload is warmed up, then all run in `rounds` rounds of alternating order.

        A workload predicted to exceed the time budget or the free memory is skipped with the prediction as its reason;
        one that raises is recorded as failed with its error.
        """
        cells = {name: Cell(workload.contestant, workload.length) for name, workload in workloads.items()}
        ready: dict[str, tuple[Timed, int, int]] = {}
        for name, workload in workloads.items():
            try:
                rounds = self._plan(workload, cells[name])
                if rounds:
                    timed, cost = self._first_call(workload, workload.length)
                    cells[name].peak_bytes_added = cost.bytes_added
                    repeats = min(MAX_REPEATS, max(1, math.ceil(self.min_seconds / max(cost.call_seconds, 1e-9))))
                    ready[name] = timed, rounds, repeats
            except Exception as error:
                cells[name].status, cells[name].reason = "failed", f"failed: {type(error).__name__}: {error}"
            if cells[name].reason:
                self.say(f"  {name}: {cells[name].reason}")
        self._run_rounds(ready, cells)
        return cells

    def _run_rounds(self, ready: dict[str, tuple[Timed, int, int]], cells: dict[str, Cell]) -> None:
        for index in range(self.rounds):
            for name in alternating_order(list(ready), index) if ready else ():
                timed, rounds, repeats = ready[name]
                if index < rounds:
                    settle_memory()
                    if repeats > 1:
                        timed()  # takes back the memory just given away, which the calls in a row do only once
                    cells[name].samples.append(take_sample(timed, index, repeats))
                    self.say(f"  round {index + 1} {name}: {cells[name].samples[-1].total:.4g} s")

    def _plan(self, workload: Workload, cell: Cell) -> int:
        """Rounds to run; 0 after writing into the cell why there will be none."""
        seconds, prepare_seconds, needed = self.predict(workload)
        rounds = affordable_rounds(self.rounds, self.budget_seconds, prepare_seconds, max(seconds, self.min_seconds))
        free = free_memory()
        history = self.history[workload.history_key]
        known = history[max(length for length in history)]
        if needed is not None and free is not None and needed > MEMORY_MARGIN * free:
            cell.status = "skipped"
            cell.reason = f"skipped: would need {gigabytes(needed)} where {gigabytes(free)} are free"
        elif rounds < 1:
            cell.status = "skipped"
            cell.reason = (
                f"skipped: would take {duration(seconds)} a call"
                + (f" and {duration(prepare_seconds)} to prepare" if prepare_seconds > seconds else "")
                + f" ({known.call_seconds:.3g} s at length {known.length}); the budget is "
                f"{duration(self.budget_seconds)}"
            )
        return 0 if cell.reason else rounds

    def predict(self, workload: Workload) -> tuple[float, float, float | None]:
        """Expected seconds of one call, seconds to prepare it, and bytes it adds, from lengths already measured."""
        self._probe(workload)
        history = self.history[workload.history_key]
        known = [history[length] for length in sorted(history) if length <= workload.length] or list(history.values())
        needed = [(cost.length, float(cost.bytes_added)) for cost in known if cost.bytes_added is not None]
        return (
            extrapolate([(cost.length, cost.call_seconds) for cost in known], workload.length),
            extrapolate([(cost.length, cost.prepare_seconds) for cost in known], workload.length),
            extrapolate(needed, workload.length) if needed else None,
        )

    def _probe(self, workload: Workload) -> None:
        """Measures doubling lengths until a quarter of the workload's is known: enough to predict, little to pay.

        It stops earlier where the next one would cost a tenth of the budget.
        """
        history = self.history.setdefault(workload.history_key, {})
        if not history:
            self._first_call(workload, FIRST_PROBE)  # pays for lazy initialisation: forgotten
            history.clear()
        length = FIRST_PROBE
        while not history or max(history) < workload.length // 4:
            length *= 2
            if length not in history:
                known = [(cost.length, cost.total) for cost in history.values()]
                if known and extrapolate(known, length) > self.budget_seconds / 10:
                    return
                self._first_call(workload, length)

    def _first_call(self, workload: Workload, length: int) -> tuple[Timed, Cost]:
        """Prepares and calls once (the warm-up), and remembers what it cost."""
        settle_memory()
        with peak_memory() as peak:
            start = perf_counter()
            timed = workload.prepare(length)
            prepared = perf_counter()
            seconds = timed()
        cost = Cost(length, prepared - start, sum(seconds.values()), peak[0] if peak else None)
        self.history.setdefault(workload.history_key, {})[length] = cost
        return timed, cost


def take_sample(timed: Timed, round_index: int, repeats: int) -> Sample:
    """Calls `repeats` times in a row and averages each phase."""
    calls = [timed() for _ in range(repeats)]
    return Sample(round_index, repeats, {phase: statistics.fmean(c[phase] for c in calls) for phase in calls[0]})


def settle_memory() -> None:
    """Collects garbage and hands freed memory back to the system, so that no contestant pays for the one before it."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc, not musl
        libc.malloc_trim(0)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Fills the list with the bytes by which resident memory rose at most inside the block; leaves it empty where the
    system cannot tell (only Linux resets its high-water mark)."""
    result: list[int] = []
    before = _status_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = None
    yield result
    after = _status_bytes("VmHWM")
    if before is not None and after is not None:
        result.append(max(0, after - before))


def _status_bytes(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    values = [line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(values[0]) * 1024 if values else None


def free_memory() -> int | None:
    """Bytes that this process can still take: what the system has available, or the control group's rest if less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    available = next(int(r.split()[1]) * 1024 for r in meminfo.read_text().splitlines() if r.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def duration(seconds: float) -> str:
    """A length of time for people: 1.2 s, 3.4 min, 5.6 h."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (math.inf, "h", 3600)):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    raise ValueError(f"not a length of time: {seconds}")


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
