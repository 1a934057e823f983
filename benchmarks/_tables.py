"""What cpu_peers.py reports: rates and ratios derived from one run's samples, tables, and the project's targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from _measure import Cell, Spread, gigabytes, paired_ratios, phase_seconds
from _report import markdown_table
from _workloads import DECODED_TOKENS

# The phases of a call that the headline of each section counts.
HEADLINE = {
    "train": ("forward_backward", "optimizer"),
    "flatness": ("forward_backward",),
    "prefill": ("prefill",),
    "decode": ("decode",),
}
TITLES = {
    "train": "Training step, batch 1: forward, backward and AdamW",
    "flatness": "Our cost per token over length: forward and backward",
    "prefill": "Prefill, batch 1: cache and the logits of the last token",
    "decode": "Decoding one token, batch 1",
}
FLATNESS_TARGET, DECODE_TARGET_MS = 1.15, 8.0
# (section, length, peer, least speed of ours over the peer's)
RATIO_TARGETS = (
    ("train", 512, "llama", 1.0),
    ("train", 2048, "llama", 1.0),
    ("train", 8192, "llama", 2.0),
    ("prefill", 512, "llama", 1.0),
    ("prefill", 16384, "llama", 4.0),
)


@dataclass(frozen=True)
class Group:
    """Cells whose samples alternated with one another: the only ones that a ratio may compare."""

    section: str
    precision: str
    mode: str
    cells: list[Cell]


@dataclass(frozen=True)
class Row:
    """One cell and what follows from its samples; the spreads are over rounds, None without samples."""

    cell: Cell
    tokens_per_second: Spread | None = None
    without_optimizer: Spread | None = None
    milliseconds_per_token: Spread | None = None
    ours_over_this: Spread | None = None
    share_of_gemm: float | None = None


def derive(group: Group, ours: str, parameters: dict[str, int], gemm_gflops: float) -> list[Row]:
    """The group's cells with their rates; `ours_over_this` compares speeds with our cell of the same length, by round.

    `share_of_gemm`: 6 floating-point operations per parameter and trained token over what plain matrix products reach.
    """
    reference = {cell.length: cell for cell in group.cells if cell.contestant == ours and cell.samples}
    return [_derive_cell(group.section, c, reference.get(c.length), parameters, gemm_gflops) for c in group.cells]


def _derive_cell(section: str, cell: Cell, ours: Cell | None, parameters: dict[str, int], gemm_gflops: float) -> Row:
    if not cell.samples:
        return Row(cell)
    phases = HEADLINE[section]
    seconds = [phase_seconds(sample, phases) for sample in cell.samples]
    tokens = DECODED_TOKENS if section == "decode" else cell.length
    speed = Spread.of([tokens / s for s in seconds])
    training = section in ("train", "flatness")
    return Row(
        cell,
        tokens_per_second=speed,
        without_optimizer=Spread.of([tokens / s.seconds["forward_backward"] for s in cell.samples])
        if training
        else None,
        milliseconds_per_token=Spread.of([1e3 * s / tokens for s in seconds]),
        ours_over_this=None
        if ours is None or ours is cell
        else Spread.of(paired_ratios(cell.samples, ours.samples, phases)),
        share_of_gemm=6e-9 * parameters[cell.contestant] * speed.median / gemm_gflops if training else None,
    )


def flatness(rows: Sequence[Row]) -> tuple[float, int, int] | None:
    """(largest over smallest median cost per token, shortest, longest length); None with less than two lengths."""
    measured = [row for row in rows if row.tokens_per_second]
    if len(measured) < 2:
        return None
    costs = [1 / row.tokens_per_second.median for row in measured if row.tokens_per_second]
    lengths = [row.cell.length for row in measured]
    return max(costs) / min(costs), min(lengths), max(lengths)


def targets(groups: Sequence[tuple[Group, list[Row]]], ours: str) -> list[dict[str, Any]]:
    """Each target that this run can judge: what was wanted, what was reached."""
    judged = []
    for group, rows in groups:
        where = f"{group.section} {group.precision}"
        if group.section == "flatness" and (flat := flatness(rows)):
            wanted = f"cost per token from {flat[1]} to {flat[2]} within a factor of {FLATNESS_TARGET}"
            judged.append(_judged(where, wanted, flat[0], flat[0] <= FLATNESS_TARGET))
        for row in rows:
            length, ratio = row.cell.length, row.ours_over_this
            if group.section == "decode" and row.cell.contestant == ours and row.milliseconds_per_token:
                ms = row.milliseconds_per_token.median
                wanted = f"under {DECODE_TARGET_MS:g} ms at {length}"
                judged.append(_judged(where, wanted, ms, ms < DECODE_TARGET_MS))
            for section, at, peer, least in RATIO_TARGETS:
                if ratio and (group.section, length, row.cell.contestant) == (section, at, peer):
                    wanted = f"{least:g} times {peer}'s speed at {at}"
                    judged.append(_judged(where, wanted, ratio.median, ratio.median >= least))
    return judged


def _judged(where: str, wanted: str, value: float, reached: bool) -> dict[str, Any]:
    return {"where": where, "wanted": wanted, "value": value, "reached": reached}


# Markdown ----------------------------------------------------------------------------------------------------------


def group_table(group: Group, rows: Sequence[Row]) -> str:
    """One group as a table; cells without samples give their reason."""
    training = group.section in ("train", "flatness")
    header = ["length", "model ", "ms a token" if group.section == "decode" else "tokens/s", "min to max"]
    header += ["without AdamW", "of GEMM"] if group.section == "train" else []
    header += ["us a token", "of GEMM"] if group.section == "flatness" else []
    header += ["memory added"] + ([] if group.section == "flatness" else ["ours / this"])
    body = [_table_row(group.section, row, len(header), training) for row in rows]
    return markdown_table(header, body)


def _table_row(section: str, row: Row, columns: int, training: bool) -> list[str]:
    cell = row.cell
    names = [str(cell.length), cell.contestant]
    if row.tokens_per_second is None or row.milliseconds_per_token is None:
        return [*names, cell.reason, *[""] * (columns - 3)]
    decoding = section == "decode"
    headline = row.milliseconds_per_token if decoding else row.tokens_per_second
    number = "{:.2f}" if decoding else "{:.0f}"
    values = [number.format(headline.median), f"{number} to {number}".format(headline.minimum, headline.maximum)]
    if training and row.without_optimizer and row.share_of_gemm is not None:
        extra = row.without_optimizer.median if section == "train" else 1e6 / row.tokens_per_second.median
        values += [f"{extra:.0f}", f"{100 * row.share_of_gemm:.0f} %"]
    values.append("unknown" if cell.peak_bytes_added is None else gigabytes(cell.peak_bytes_added))
    if section != "flatness":
        values.append("" if row.ours_over_this is None else f"{row.ours_over_this.median:.2f}")
    return [*names, *values]


def section_parts(groups: Sequence[tuple[Group, list[Row]]]) -> list[str]:
    """The tables of all groups, one per section, precision and mode."""
    parts: list[str] = []
    merged: dict[tuple[str, str, str], list[Row]] = {}
    for group, rows in groups:
        merged.setdefault((group.section, group.precision, group.mode), []).extend(rows)
    for (section, precision, mode), rows in merged.items():
        parts += [f"## {TITLES[section]}: {precision}{f', {mode}' if mode else ''}", ""]
        parts += [group_table(Group(section, precision, mode, []), rows), ""]
        if section == "flatness" and (flat := flatness(rows)):
            parts += [f"Dearest over cheapest token between {flat[1]} and {flat[2]} tokens: {flat[0]:.3f}.", ""]
    return parts


def target_parts(judged: Sequence[dict[str, Any]]) -> list[str]:
    if not judged:
        return []
    body = [[t["where"], t["wanted"], f"{t['value']:.2f}", "yes" if t["reached"] else "no"] for t in judged]
    return ["## Targets", "", markdown_table(["section ", "wanted ", "measured", "reached "], body), ""]


def as_json(group: Group, rows: Sequence[Row]) -> dict[str, Any]:
    """The group with every sample and what was derived from it."""
    return {
        "section": group.section,
        "precision": group.precision,
        "mode": group.mode,
        "cells": [asdict(row) for row in rows],
    }
