"""`megalodon convert`: read and write other formats. One sub-command per format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalodon.choices import DtypeName

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def convert() -> None:
    """Read and write other implementations' checkpoints, and those of runs on a mesh."""


@app.command()
def reference(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="the authors' checkpoint folder; ours with --to-reference")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make")],
    to_reference: Annotated[
        bool, typer.Option("--to-reference", help="write the authors' format from our model folder")
    ] = False,
    model_parallel_size: Annotated[
        int, typer.Option(help="with --to-reference: how many ranks to cut the model for", min=1)
    ] = 1,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="of the weights written; kept as they are if not given")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="save this tokenizer with the model: bytes, a file, or a folder")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="refuse a checkpoint of any other; if not given, its config tells which it is")
    ] = None,
) -> None:
    """The authors' implementations of Megalodon and Gecko: checkpoints of any model-parallel size, exact to the bit."""
    from megalodon.convert.folders import pretrained_to_reference, reference_to_pretrained
    from megalodon.data import load_tokenizer
    from megalodon.inference.loading import torch_dtype

    if to_reference:
        if tokenizer is not None:
            raise ValueError("--tokenizer: the authors' format does not hold one; leave it out with --to-reference")
        if architecture is not None:
            raise ValueError("--architecture is for reading; with --to-reference, the model folder says it")
        config = pretrained_to_reference(source, target, model_parallel_size, torch_dtype(dtype))
    else:
        if model_parallel_size != 1:
            raise ValueError("--model-parallel-size is for --to-reference; when reading, the checkpoint says it")
        loaded = None if tokenizer is None else load_tokenizer(tokenizer)
        config = reference_to_pretrained(source, target, torch_dtype(dtype), loaded, architecture)
    typer.echo(
        f"{target}: {config.model_type}, {config.num_layers} layers, model_dim {config.model_dim}, "
        f"vocab_size {config.vocab_size}"
    )


@app.command()
def checkpoint(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a step's folder of a run on a mesh")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make")],
    dtype: Annotated[
        DtypeName | None, typer.Option(help="of the weights written; kept as they are if not given")
    ] = None,
) -> None:
    """A model folder for Transformers from a sharded training checkpoint: no GPU, a gigabyte at a time."""
    from megalodon.convert.folders import checkpoint_to_pretrained
    from megalodon.inference.loading import torch_dtype

    config = checkpoint_to_pretrained(source, target, torch_dtype(dtype))
    typer.echo(f"{target}: {config.num_layers} layers, model_dim {config.model_dim}, vocab_size {config.vocab_size}")
