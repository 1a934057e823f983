"""The tables of a report: headings and rows of text, for HTML and for Markdown alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megalodon.comparison.summary import Architecture, Runs, Spread, Summary
from megalodon.training.progress import duration

MISSING = "-"
MOST_TEXTS = 6
"""Test texts that have a column each."""


@dataclass(frozen=True)
class Table:
    """A table with a title and a sentence on what it is; the first column is text, the others are numbers."""

    title: str
    note: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As GitHub reads it."""
        lines = [self.headings, ["---", *["--:"] * (len(self.headings) - 1)], *self.rows]
        body = "\n".join("| " + " | ".join(row) + " |" for row in lines)
        return f"## {self.title}\n\n{self.note}\n\n{body}\n"


def all_tables(summary: Summary) -> list[Table]:
    """Those that have something to show."""
    tables = [results(summary), models(summary)]
    if any(each.sweep for each in summary.architectures):
        tables.append(sweep(summary))
    if any(each.speed for each in summary.architectures):
        tables.append(speed(summary))
    tables += [
        by_range(summary, "Loss by tokens since everything was forgotten", "tokens", lambda runs: runs.by_distance),
        by_range(summary, "Loss by position in the text", "position", lambda runs: runs.by_position),
        by_range(summary, "Loss by place in the chunk", "place", lambda runs: runs.by_place),
    ]
    return [table for table in tables if table.rows]


def results(summary: Summary) -> Table:
    """The head-to-head, and the compressors below it, best first."""
    names = list(dict.fromkeys(name for each in summary.architectures for name in each.tokens.documents))
    names = names if len(names) <= MOST_TEXTS else []
    texts = [Path(name).stem for name in names]
    tasks = list(dict.fromkeys(task for each in summary.architectures for task in each.recall))
    headings = ["", "held out", "test", *texts, "held out at equal time", "test at equal time", *tasks, "seeds"]

    def row(each: Architecture) -> list[str]:
        time = each.time
        seeds = str(each.tokens.finished) + (f" (and {each.tokens.diverged} diverged)" if each.tokens.diverged else "")
        return [
            each.name,
            shown(each.tokens.held_out),
            shown(each.tokens.test),
            *(shown(each.tokens.documents.get(name)) for name in names),
            shown(None if time is None else time.held_out),
            shown(None if time is None else time.test),
            *(f"{each.recall[task]:.1%}" if task in each.recall else MISSING for task in tasks),
            seeds,
        ]

    def order(each: Architecture) -> float:
        number = each.tokens.test or each.tokens.held_out
        return float("inf") if number is None else number.mean

    rows = [row(each) for each in sorted(summary.architectures, key=order)]
    if summary.texts is not None and summary.key == "bits_per_byte":
        for method, bits in summary.texts["bits_per_byte"].items():
            own = {
                document["name"]: 8 * document["compressed"][method] / document["bytes"]
                for document in summary.texts["documents"]
            }
            cells = [f"{own[name]:.3f}" if name in own else MISSING for name in names]
            rows.append([method, MISSING, f"{bits:.3f}", *cells, *[MISSING] * (3 + len(tasks))])
    time = (
        ""
        if summary.seconds is None
        else (
            f" Equal time is {duration(summary.seconds)} of training on this machine, by seconds a step measured alone."
        )
    )
    note = f"In {summary.unit}, lower is better; mean ± standard deviation over seeds.{time}"
    return Table("Results", note, headings, rows)


def models(summary: Summary) -> Table:
    """What was trained, and how."""
    rows = []
    for each in summary.architectures:
        sizes = ", ".join(f"{name} {size}" for name, size in each.sizes.items())
        carried = {"streamed": "carried", "reset": "forgotten each row", "packed": "packed rows"}[each.mode]
        reading = "whole" if each.cut is None else f"cut every {each.cut:,}"
        rate = MISSING if each.rate is None else f"{each.rate:g}"
        pace = MISSING if each.speed is None else f"{each.speed['training']['tokens_a_second']:,.0f}"
        steps = [f"{each.tokens.steps:,}", MISSING if each.time is None else f"{each.time.steps:,}"]
        rows.append([each.name, f"{each.parameters:,}", sizes, carried, reading, rate, pace, *steps])
    headings = ["", "parameters", "sizes found", "memory in training", "test texts", "rate", "training, tokens/s"]
    headings += ["steps", "steps at equal time"]
    return Table("Models", "All read the same batches in the same order.", headings, rows)


def sweep(summary: Summary) -> Table:
    """Held-out numbers of all rates tried."""
    rates = sorted({rate for each in summary.architectures for rate, _ in each.sweep})
    rows = []
    for each in summary.architectures:
        found = dict(each.sweep)

        def cell(rate: float, found: dict[float, float | None] = found, best: float | None = each.rate) -> str:
            if rate not in found:
                return MISSING
            number = found[rate]
            text = "diverged" if number is None else f"{number:.4f}"
            return f"**{text}**" if rate == best else text

        rows.append([each.name, *map(cell, rates)])
    note = f"Held out, {summary.unit}. The best is not at an edge: the grid was widened until it was not."
    return Table("Learning rates", note, ["", *(f"{rate:g}" for rate in rates)], rows)


def speed(summary: Summary) -> Table:
    """Reading, remembering and decoding at each length."""
    measured = [(each.name, each.speed) for each in summary.architectures if each.speed is not None]
    rows = [
        [
            f"{name}, {one['length']:,}",
            f"{one['tokens_a_second']:,.0f}",
            f"{one['decoded_a_second']:,.0f}",
            f"{one['state_bytes'] / 1e3:,.0f}",
            f"{one['peak_bytes'] / 1e6:,.0f}",
        ]
        for length in sorted({one["length"] for _, record in measured for one in record["reading"]})
        for name, record in measured
        for one in record["reading"]
        if one["length"] == length
    ]
    clocks = " and ".join(sorted({record["clock"] for _, record in measured}))
    note = (
        f"Each alone, in {clocks} time. The state is what one row carries after the text; the peak is memory beyond "
        "what the process had before it read the shortest."
    )
    headings = ["text of so many tokens", "read, tokens/s", "decoded, tokens/s", "state, KB", "peak, MB"]
    return Table("Memory and speed by length", note, headings, rows)


def by_range(summary: Summary, title: str, what: str, ranges: Callable[[Runs], list[tuple[int, int, Spread]]]) -> Table:
    """A row a range, a column an architecture, at equal tokens."""
    columns = [(each.name, {(a, b): s for a, b, s in ranges(each.tokens)}) for each in summary.architectures]
    columns = [(name, found) for name, found in columns if found]
    keys = sorted({key for _, found in columns for key in found})
    rows = [[f"{a:,} to {b:,}", *(shown(found.get((a, b))) for _, found in columns)] for a, b in keys]
    return Table(title, f"Test texts, {summary.unit}.", [what, *(name for name, _ in columns)], rows)


def shown(number: Spread | None) -> str:
    """A number, or the sign for none."""
    return MISSING if number is None else str(number)
