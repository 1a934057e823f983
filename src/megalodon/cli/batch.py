"""`megalodon batch`: answer the prompts of a JSONL file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalodon.inference import load_model, load_tokenizer_for
from megalodon.inference.batch import count_lines, run_batch
from megalodon.inference.engine import Engine
from megalodon.inference.loading import RunDtype, torch_dtype

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def batch(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="a model's folder")],
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help='lines like {"prompt": "...", "max_tokens": 100}')],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="one line for each; gone on with if it exists")],
    seed: Annotated[int, typer.Option(help="of lines that have none, with their number")] = 0,
    slots: Annotated[int, typer.Option(min=1, max=512, help="sequences that generate at once")] = 32,
    tokenizer_name: Annotated[str | None, typer.Option("--tokenizer", help="if the model's folder holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if not given")] = None,
    dtype: Annotated[RunDtype | None, typer.Option(help="that of the weights if not given; int8: for a CPU")] = None,
) -> None:
    """Answer many prompts. Stopped at any time, the same command goes on where it was."""
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    model = load_model(folder, device, torch_dtype(dtype))
    engine = Engine(model, load_tokenizer_for(model, folder, tokenizer_name), slots).start()
    columns = (TextColumn("lines"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("", total=count_lines(source))
            done = run_batch(engine, source, target, seed, lambda lines: progress.update(task, completed=lines))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {target}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        engine.close()
    print(f"{done:,} lines in {target}", file=sys.stderr)
