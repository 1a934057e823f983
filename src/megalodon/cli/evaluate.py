"""`megalodon evaluate`: measure a model on held-out text. One sub-command per task."""

from __future__ import annotations

import json
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import megalodon
from megalodon.choices import CorpusKind, RunDtype
from megalodon.cli.evaluate_memory import memory
from megalodon.cli.evaluate_recall import recall
from megalodon.cli.evaluate_trained import induction, passkey

if TYPE_CHECKING:
    from megalodon.evaluation import Progress as Scored

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def evaluate() -> None:
    """Measure a model on held-out text."""


for _task in (memory, recall, passkey, induction):
    app.command()(_task)


@app.command()
def perplexity(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="a model's folder")],
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="files, folders, globs, stdlib, or a dataset's name")
    ],
    output: Annotated[Path | None, typer.Option(help="write perplexity.json and perplexity.png to this folder")] = None,
    piece_length: Annotated[
        int | None,
        typer.Option(help="tokens per forward pass; a multiple of the chunk size, 2048 or more, if not given"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="read only so many tokens of each document")] = None,
    max_documents: Annotated[int | None, typer.Option(help="read only so many documents")] = None,
    reset_every: Annotated[int | None, typer.Option(help="forget everything after every so many tokens")] = None,
    tokens_file: Annotated[
        Path | None, typer.Option(help="write the loss of every token to this .parquet or .csv file")
    ] = None,
    kind: Annotated[CorpusKind, typer.Option(help="what the sources are; told by their names with auto")] = "auto",
    field: Annotated[str, typer.Option(help="the field that holds the text, where rows have fields")] = "text",
    split: Annotated[str | None, typer.Option(help="of a dataset: such as test or train[:10%]")] = None,
    separator: Annotated[str | None, typer.Option(help="a new document begins after each of these")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="leave out rows without text, and say how many")
    ] = False,
    tokenizer_name: Annotated[str | None, typer.Option("--tokenizer", help="if the model's folder holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if not given")] = None,
    dtype: Annotated[RunDtype | None, typer.Option(help="that of the weights if not given; int8: for a CPU")] = None,
) -> None:
    """Loss and bits per byte of documents of any length, overall and by position, in constant memory."""
    import torch

    from megalodon.data import Corpus, Document
    from megalodon.data.separator import Counter
    from megalodon.evaluation import TokensFile, evaluate_perplexity, plot_by_position
    from megalodon.files import write_file, write_text
    from megalodon.inference import load_model, load_tokenizer_for
    from megalodon.inference.generation import default_piece_length
    from megalodon.inference.loading import torch_dtype

    wanted = {"kind": kind, "field": field, "split": split, "separator": separator, "max_documents": max_documents}
    wanted["bad_rows"] = "skip" if skip_bad_rows else "refuse"
    corpus = Corpus({"source": sources if len(sources) > 1 else sources[0], **wanted})
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    model = load_model(folder, device, torch_dtype(dtype))
    tokenizer = load_tokenizer_for(model, folder, tokenizer_name)
    piece_length = default_piece_length(model.model.dimensions.alignment) if piece_length is None else piece_length
    started = time.perf_counter()
    counter = Counter([] if separator else tokenizer.separators)
    documents = (Document(d.name, counter.through(d.pieces)) for d in corpus.documents())
    total = corpus.total_bytes if max_tokens is None else None
    with ProgressBar(total) as bar, ExitStack() as opened:
        on_losses = None if tokens_file is None else opened.enter_context(TokensFile(tokens_file)).add
        report = evaluate_perplexity(
            model, tokenizer, documents, piece_length, max_tokens, bar.update, reset_every, on_losses
        )
    for told in (corpus.found.told(), corpus.bad_rows.told(), counter.told()):
        if told is not None:
            print(f"note: {told}", file=sys.stderr)
    seconds = time.perf_counter() - started
    settings = {
        "model": str(folder),
        "sources": sources,
        "tokenizer": tokenizer.name,
        "piece_length": piece_length,
        "max_tokens": max_tokens,
        "reset_every": reset_every,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "machine": platform.node(),
        "versions": {"megalodon": megalodon.__version__, "torch": torch.__version__},
        "seconds": seconds,
        "tokens_per_second": report["overall"]["tokens"] / seconds,
    }
    print_report(report)
    if output is not None:
        write_text(output / "perplexity.json", json.dumps({"settings": settings, **report}, indent=1) + "\n")
        write_file(output / "perplexity.png", lambda path: plot_by_position(report, path))
        print(f"written: {output / 'perplexity.json'}, {output / 'perplexity.png'}")


class ProgressBar:
    """Progress on standard error, where that is a terminal: tokens, speed, loss so far, and time left if known."""

    def __init__(self, total_bytes: int | None) -> None:
        self.total = total_bytes
        console = Console(stderr=True)
        text = TextColumn("{task.description}")
        columns = [text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
        self.task = self.progress.add_task("", total=total_bytes)
        self.started = time.perf_counter()

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, scored: Scored) -> None:
        """Show how far it is."""
        score = scored.score
        speed = score.tokens / (time.perf_counter() - self.started)
        name = Path(scored.name).name
        loss = score.nats / score.tokens
        text = f"document {scored.documents} ({name}) {score.tokens:,} tokens {speed:,.0f}/s loss {loss:.4f}"
        total = self.total if score.bytes is not None else None
        self.progress.update(self.task, description=text, completed=score.bytes or 0, total=total)


def print_report(report: dict[str, Any]) -> None:
    """Tables for people, on standard output."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for what, key in (
        ("position", "by_position"),
        ("place in the chunk", "by_chunk_place"),
        ("tokens since the cut", "by_distance"),
    ):
        if report[key]:
            console.print(_table(what, [(_range(entry), entry) for entry in report[key]]))
    documents = [(entry["name"], entry) for entry in report["documents"][:20]]
    if len(report["documents"]) > len(documents):
        documents.append((f"... {len(report['documents']) - len(documents)} more", {}))
    overall = f"all {report['overall']['documents']} documents"
    console.print(_table("document", [*documents, (overall, report["overall"])]))


def _table(what: str, rows: list[tuple[str, dict[str, Any]]]) -> Table:
    table = Table(what, box=None)
    for heading in ("tokens", "loss", "perplexity", "bits/byte"):
        table.add_column(heading, justify="right")
    for name, entry in rows:
        tokens = f"{entry['tokens']:,}" if entry else ""
        numbers = (entry.get(key) for key in ("loss", "perplexity", "bits_per_byte"))
        table.add_row(name, tokens, *("-" if number is None else f"{number:.4f}" for number in numbers))
    return table


def _range(entry: dict[str, Any]) -> str:
    return f"{entry['from']:,} to {entry['to']:,}"
