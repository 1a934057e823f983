"""`megalodon batch`: answer the prompts of a JSONL file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalodon.choices import RunDtype

if TYPE_CHECKING:
    from megalodon.inference import Engine

LINES = 'lines like {"prompt": "...", "max_tokens": 100}, or OpenAI\'s batch format'
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def batch(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="a model's folder")],
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help=LINES)],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="one line for each; gone on with if it exists")],
    seed: Annotated[int, typer.Option(help="of lines that have none, with their number")] = 0,
    slots: Annotated[int, typer.Option(min=1, max=512, help="sequences that generate at once")] = 32,
    name: Annotated[str | None, typer.Option(help="OpenAI's format: the model of the lines; its folder's name")] = None,
    tokenizer_name: Annotated[str | None, typer.Option("--tokenizer", help="if the model's folder holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if not given")] = None,
    dtype: Annotated[RunDtype | None, typer.Option(help="that of the weights if not given; int8: for a CPU")] = None,
) -> None:
    """Answer many prompts. Stopped at any time, the same command goes on where it was."""
    from megalodon.inference import Engine, load_model, load_tokenizer_for
    from megalodon.inference.batch import count_lines
    from megalodon.inference.loading import torch_dtype

    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    model = load_model(folder, device, torch_dtype(dtype))
    engine = Engine(model, load_tokenizer_for(model, folder, tokenizer_name), slots).start()
    columns = (TextColumn("lines"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("", total=count_lines(source))
            done = _run(engine, source, target, name or folder.resolve().name, seed, partial(progress.update, task))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {target}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        engine.close()
    print(f"{done:,} lines in {target}", file=sys.stderr)


def _run(engine: Engine, source: Path, target: Path, name: str, seed: int, update: Callable[..., None]) -> int:
    from megalodon.inference.batch import run_batch

    def on_line(lines: int) -> None:
        update(completed=lines)

    if not _is_openai(source):
        return run_batch(engine, source, target, seed, on_line)
    from megalodon.serving.offline import run_openai_batch  # needs the extra `serve`

    return run_openai_batch(engine, source, target, name, seed, on_line)


def _is_openai(source: Path) -> bool:
    with source.open("rb") as file:
        first = next((raw for raw in file if raw.strip()), b"")
    try:
        return "custom_id" in json.loads(first)
    except (ValueError, TypeError):
        return False  # whose error names the line
