"""How the benchmarks write: one JSON with every sample and one Markdown table beside it, each replaced in one move."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _machine import machine_lines, machine_slug

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_WARNING = "**Quick run: it shows that the harness works; its numbers are not measurements.**"


def new_run(benchmark: str, machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a result: which run, when, how it was called, on what."""
    return {
        "benchmark": benchmark,
        "run": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [
            "python",
            f"benchmarks/{benchmark.rpartition('/')[0]}/{Path(sys.argv[0]).name}".replace("//", "/"),
            *sys.argv[1:],
        ],
        "machine": machine,
        "settings": settings,
    }


def save(result: dict[str, Any], markdown: str, folder: Path, name: str) -> tuple[Path, Path]:
    """Writes `folder/NAME-MACHINE.json` and `.md`; the machine's name is its processor and threads."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{machine_slug(result['machine'])}"
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    write_atomically(paths[0], json.dumps(result, indent=1) + "\n")
    write_atomically(paths[1], markdown)
    return paths


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path` and renames, so that a reader or an interruption never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def document(title: str, result: dict[str, Any], parts: Sequence[str], quick: bool) -> str:
    """A Markdown page: title, the quick run's warning, when and how, the machine, then the parts."""
    head = [f"# {title}", ""]
    if quick:
        head += [QUICK_WARNING, ""]
    head += [f"`{' '.join(result['command'])}`, {result['started']}, run {result['run'][:8]}", ""]
    return "\n".join([*head, *machine_lines(result["machine"]), "", *parts]).rstrip() + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a column is right-aligned unless its title ends in a space (which is stripped).

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells where the header has {len(header)}")
    rule = ["---" if title.endswith(" ") else "--:" for title in header]
    lines = [[title.strip() for title in header], rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
