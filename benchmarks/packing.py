"""What isolating packed documents costs: a training step with `segment_ids` beside the plain step of the same shape.

Rows are cut into documents by several distributions of lengths; the plain step and all packed ones alternate in each
round, and a ratio compares calls of one round. The target is at most 1.3 times the plain step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _machine import describe_machine
from _measure import Cell, Meter, Spread, Timed, Workload, paired_ratios, phase_seconds
from _report import RESULTS, document, markdown_table, new_run, save
from _workloads import CHUNK, Contestant, Precision, adamw, build_megalodon, prepare_training
from torch import Tensor

TARGET = 1.3
PLAIN = "plain"
PHASES = ("forward_backward",)  # the optimiser's part is the same in both and would only hide the difference
DISTRIBUTIONS = {
    "one document": "the whole row, as segment_ids that never change",
    "two halves": "two documents, cut away from the chunk's border",
    "log-normal 400": "log-normal lengths with a median of 400 tokens, as web text has",
    "uniform 64-1024": "uniform lengths from 64 to 1024 tokens",
    "short 8-64": "uniform lengths from 8 to 64 tokens",
    "long and short": "one document of half the row, the rest from 8 to 64 tokens",
}


def document_lengths(distribution: str, total: int, seed: int = 0) -> list[int]:
    """Lengths of the documents in a row of `total` tokens; the last one is cut to fit.

    Raises:
        ValueError: there is no such distribution.
    """
    draw = random.Random(seed)
    match distribution:
        case "one document":
            return [total]
        case "two halves":
            first = max(1, total // 2 - CHUNK // 3) if total > CHUNK else max(1, total // 2)
            return [first, total - first] if total > first else [total]
        case "log-normal 400":
            return _fill(total, lambda: max(1, round(draw.lognormvariate(5.99, 1.0))))
        case "uniform 64-1024":
            return _fill(total, lambda: draw.randint(64, 1024))
        case "short 8-64":
            return _fill(total, lambda: draw.randint(8, 64))
        case "long and short":
            return [total - total // 2, *_fill(total // 2, lambda: draw.randint(8, 64))]
    raise ValueError(f"distribution {distribution!r} is unknown; there are {', '.join(DISTRIBUTIONS)}")


def _fill(total: int, length: Callable[[], int]) -> list[int]:
    lengths: list[int] = []
    while total > 0:
        lengths.append(min(total, length()))
        total -= lengths[-1]
    return lengths


def segment_ids(lengths: list[int]) -> Tensor:
    """[1, L] int64 ids that change where a document begins."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def prepare_packed(
    contestant: Contestant, optimizer: torch.optim.Optimizer, precision: Precision, distribution: str, length: int
) -> Timed:
    """A training step on `length` tokens, packed by the distribution or plain."""
    segments = None if distribution == PLAIN else segment_ids(document_lengths(distribution, length))
    return prepare_training(contestant, optimizer, precision, length, segment_ids=segments)


def measure(meter: Meter, precision: Precision, lengths: tuple[int, ...]) -> dict[int, dict[str, Cell]]:
    """For each length, the plain step and every distribution, alternating."""
    contestant = build_megalodon()
    optimizer = adamw(contestant)
    measured = {}
    for length in lengths:
        typer.echo(f"{precision}, length {length}", err=True)
        workloads = {
            name: Workload(name, precision, length, partial(prepare_packed, contestant, optimizer, precision, name))
            for name in (PLAIN, *DISTRIBUTIONS)
        }
        measured[length] = meter.measure(workloads)
    return measured


def rows_of(length: int, cells: dict[str, Cell]) -> list[dict[str, Any]]:
    """One dictionary per cell: documents, milliseconds, the packed over the plain step by round, and every sample."""
    rows = []
    for name, cell in cells.items():
        row: dict[str, Any] = {"length": length, "distribution": name, **asdict(cell)}
        row["documents"] = 1 if name == PLAIN else len(document_lengths(name, length))
        if cell.samples:
            row["milliseconds"] = asdict(Spread.of([1e3 * phase_seconds(s, PHASES) for s in cell.samples]))
            if name != PLAIN and cells[PLAIN].samples:
                row["over_plain"] = asdict(Spread.of(paired_ratios(cell.samples, cells[PLAIN].samples, PHASES)))
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; those without samples give their reason."""
    body = []
    for row in rows:
        values = [row["reason"], "", ""]
        if row["samples"]:
            over = row.get("over_plain")
            ratio = f"{over['median']:.2f} ({over['minimum']:.2f} to {over['maximum']:.2f})" if over else ""
            verdict = ("yes" if over["median"] <= TARGET else "no") if over else ""
            values = [f"{row['milliseconds']['median']:.0f}", ratio, verdict]
        body.append([str(row["length"]), row["distribution"], str(row["documents"]), *values])
    return markdown_table(["length", "documents ", "number", "ms", "over plain (min to max)", f"<= {TARGET} "], body)


def main(
    length: Annotated[list[int] | None, typer.Option(min=16, help="Tokens in the row (repeatable).")] = None,
    bf16: Annotated[bool, typer.Option(help="bf16 autocast instead of float32.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    budget: Annotated[float, typer.Option(min=1, help="Seconds that one distribution may take at one length.")] = 600,
    min_seconds: Annotated[float, typer.Option(min=0, help="Calls are repeated in a round for at least this.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; PyTorch's choice unless given.")] = None,
    quick: Annotated[bool, typer.Option(help="One short length, two rounds: shows that the script works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measures what isolating packed documents costs, and writes JSON and a table; exit status 1 on a failure."""
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
    lengths = tuple(length or (2048, 8192))
    if quick:
        lengths, rounds, budget, min_seconds = (256,), 2, 20.0, 0.0
    precision: Precision = "bf16-autocast" if bf16 else "float32"
    settings = {"rounds": rounds, "min_seconds": min_seconds, "precision": precision, "batch": 1, "target": TARGET}
    result = new_run("packing", describe_machine(512 if quick else 2048), settings)
    meter = Meter(rounds, budget, min_seconds, partial(typer.echo, err=True))
    measured = measure(meter, precision, lengths)
    result["rows"] = rows = [row for at, cells in measured.items() for row in rows_of(at, cells)]
    parts = [
        f"Forward and backward of the 16 M model, {precision}, batch 1; medians over {rounds} alternating rounds, "
        "ratios within rounds.",
        "",
        *(f"- {name}: {description}" for name, description in DISTRIBUTIONS.items()),
        "",
        table(rows),
    ]
    name = "-".join(["packing", *(["bf16"] if bf16 else []), *(["quick"] if quick else [])])
    page = document("Packed documents beside the plain step", result, parts, quick)
    typer.echo(save(result, page, output, name)[1].read_text())
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
