"""`megalodon tokenizer`: train a byte-pair encoding on text and save it as a folder that AutoTokenizer loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def tokenizer(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="stdlib, a file, a folder, a glob, or a dataset's name")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder for the tokenizer")],
    vocab_size: Annotated[
        int, typer.Option(help="ids at most: 256 bytes, the end of a document, the rest learned")
    ] = 32000,
    min_frequency: Annotated[int, typer.Option(help="a pair must occur this often to become a token")] = 2,
    kind: Annotated[str, typer.Option(help="what the source is; told by its name with auto")] = "auto",
    field: Annotated[str, typer.Option(help="the field that holds the text, where rows have fields")] = "text",
    name: Annotated[str | None, typer.Option(help="Hugging Face: the dataset's configuration")] = None,
    split: Annotated[str | None, typer.Option(help="of a dataset: such as train or train[:10%]")] = None,
    separator: Annotated[str | None, typer.Option(help="a new document begins after each of these")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="leave out rows without text, and say how many")
    ] = False,
    max_documents: Annotated[int | None, typer.Option(help="read only this many documents")] = None,
) -> None:
    """Train a byte-level BPE on SOURCE and save it in OUT. `tokenizer: OUT` in a training config uses it."""
    from megalodon.data.bpe import train_bpe_folder
    from megalodon.data.corpus import Corpus

    options = {"kind": kind, "field": field, "name": name, "split": split, "max_documents": max_documents}
    options |= {"separator": separator, "bad_rows": "skip" if skip_bad_rows else "refuse"}
    corpus = Corpus({"source": source} | options)
    texts = (document.pieces for document in corpus.documents())
    trained = train_bpe_folder(texts, output, vocab_size, min_frequency, show_progress=sys.stderr.isatty())
    for told in (corpus.found.told(), corpus.bad_rows.told()):
        if told is not None:
            print(f"note: {told}", file=sys.stderr)
    print(f"{output}: {trained.vocab_size} ids, end of document {trained.eos_token_id}")
    if trained.vocab_size < vocab_size:
        print(f"the text has no more pairs that occur {min_frequency} times, so there are fewer ids than {vocab_size}")
