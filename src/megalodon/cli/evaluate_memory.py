"""`megalodon evaluate memory`: what a model's memory is worth, as a whole and by part."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import megalodon
from megalodon.choices import CUTS, RunDtype

if TYPE_CHECKING:
    from megalodon.evaluation.perplexity import Progress as Scored


def memory(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="a model's folder")],
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="files, folders or globs of long texts")],
    cuts: Annotated[str, typer.Option(help="tokens between two places where it forgets")] = ",".join(map(str, CUTS)),
    parts: Annotated[str | None, typer.Option(help="parts of the memory, such as average; all if not given")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="read only so many tokens of each document")] = None,
    output: Annotated[Path | None, typer.Option(help="write memory.json to this folder")] = None,
    tokenizer_name: Annotated[str | None, typer.Option("--tokenizer", help="if the model's folder holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if not given")] = None,
    dtype: Annotated[RunDtype | None, typer.Option(help="that of the weights if not given; int8: for a CPU")] = None,
) -> None:
    """Loss when everything, or one part of the memory, is forgotten after every so many tokens, beside never."""
    import torch

    from megalodon.data import Corpus
    from megalodon.evaluation.memory import evaluate_memory
    from megalodon.files import write_text
    from megalodon.inference import load_model, load_tokenizer_for
    from megalodon.inference.loading import torch_dtype

    try:
        lengths = [int(cut) for cut in cuts.split(",")]
    except ValueError:
        raise ValueError(f"--cuts {cuts}: give whole numbers with commas between them, such as 256,1024") from None
    corpus = Corpus({"source": sources if len(sources) > 1 else sources[0]})
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    model = load_model(folder, device, torch_dtype(dtype))
    tokenizer = load_tokenizer_for(model, folder, tokenizer_name)
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("")

        def show(number: int, readings: int, scored: Scored) -> None:
            text = f"reading {number + 1} of {readings}: {Path(scored.name).name} {scored.score.tokens:,} tokens"
            bar.update(task, description=text, completed=number, total=readings)

        report = evaluate_memory(
            model,
            tokenizer,
            corpus.documents,
            lengths,
            None if parts is None else parts.split(","),
            max_tokens,
            on_progress=show,
        )
    settings = {
        "model": str(folder),
        "sources": sources,
        "max_tokens": max_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"megalodon": megalodon.__version__, "torch": torch.__version__},
    }
    print_report(report)
    if output is not None:
        write_text(output / "memory.json", json.dumps({"settings": settings, **report}, indent=1) + "\n")
        print(f"written: {output / 'memory.json'}")


def print_report(report: dict[str, Any]) -> None:
    """A row a cut, a column a part, on standard output."""
    key = "loss" if report["never"]["bits_per_byte"] is None else "bits_per_byte"
    names = list(dict.fromkeys(entry["part"] for entry in report["cuts"]))
    table = Table("forgotten every", box=None, title=f"{'nats a token' if key == 'loss' else 'bits a byte'}")
    for name in names:
        table.add_column(name or "everything", justify="right")
    for cut in dict.fromkeys(entry["every"] for entry in report["cuts"]):
        row = {entry["part"]: entry.get(key) for entry in report["cuts"] if entry["every"] == cut}
        table.add_row(f"{cut:,}", *("-" if row[name] is None else f"{row[name]:.4f}" for name in names))
    table.add_row("never", *[f"{report['never'][key]:.4f}"] * len(names))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    reach = "no cut here" if report["reach"] is None else f"a cut every {report['reach']:,} tokens"
    console.print(f"{reach} costs {report['near']} or less", highlight=False)
