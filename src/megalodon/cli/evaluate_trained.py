"""`megalodon evaluate passkey` and `megalodon evaluate induction`: what a trained model remembers, without training."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import megalodon
from megalodon.choices import RunDtype

if TYPE_CHECKING:
    from megalodon.models import CausalLM

Folder = Annotated[Path, typer.Argument(metavar="MODEL", help="a model's folder")]
Output = Annotated[Path | None, typer.Option(help="write the report to this folder")]
Seed = Annotated[int, typer.Option(help="of what is drawn")]
TokenizerName = Annotated[str | None, typer.Option("--tokenizer", help="if the model's folder holds none")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if not given")]
Dtype = Annotated[RunDtype | None, typer.Option(help="that of the weights if not given; int8: for a CPU")]


def passkey(
    folder: Folder,
    lengths: Annotated[str, typer.Option(help="tokens of the texts; K and M stand for 1024 and 1024 K")] = "1K,4K,16K",
    depths: Annotated[str, typer.Option(help="where the number stands, 0 to 1")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="numbers for each length and depth, read side by side")] = 8,
    digits: Annotated[int, typer.Option(help="of the numbers")] = 5,
    filler: Annotated[
        str | None, typer.Option(help="a file, folder or glob of text to hide it in; four sentences if not given")
    ] = None,
    seed: Seed = 0,
    output: Output = None,
    tokenizer_name: TokenizerName = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask for a number that stood once in a long text, at some depth of it: texts of any length, in constant memory."""
    from megalodon.evaluation.passkey import evaluate_passkey
    from megalodon.inference import load_model, load_tokenizer_for
    from megalodon.inference.loading import torch_dtype

    sizes, places = lengths_of(lengths), _numbers("depths", depths)
    text = None if filler is None else _text(filler)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    model = load_model(folder, device, torch_dtype(dtype))
    tokenizer = load_tokenizer_for(model, folder, tokenizer_name)
    typer.echo(f"{'length':>10} {'depth':>6} {'exact':>7} {'preferred':>10} {'nats':>8} {'of others':>10}")

    def told(entry: dict[str, Any]) -> None:
        typer.echo(
            f"{entry['length']:>10,} {entry['depth']:>6.2f} {entry['exact']:>7.1%} {entry['preferred']:>10.1%} "
            f"{entry['nats']:>8.2f} {entry['nats_of_others']:>10.2f}"
        )

    report = evaluate_passkey(model, tokenizer, sizes, places, trials, digits, seed, text, on_result=told)
    settings = {**_settings(folder, model), "tokenizer": tokenizer.name, "filler": filler}
    _written(output, "passkey.json", {"settings": settings, **report})


def induction(
    folder: Folder,
    lengths: Annotated[str, typer.Option(help="tokens of both readings; K and M stand for 1024 and 1024 K")] = (
        "256,1K,4K,16K"
    ),
    trials: Annotated[int, typer.Option(help="rows of each length, read side by side")] = 4,
    seed: Seed = 0,
    output: Output = None,
    tokenizer_name: TokenizerName = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Read random tokens twice: the loss of the second reading, and how many of its tokens are the likeliest."""
    from megalodon.evaluation.induction import evaluate_induction
    from megalodon.inference import load_model, load_tokenizer_for
    from megalodon.inference.loading import torch_dtype

    sizes = lengths_of(lengths)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    model = load_model(folder, device, torch_dtype(dtype))
    tokenizer = load_tokenizer_for(model, folder, tokenizer_name)
    typer.echo(f"{'length':>10} {'first':>8} {'again':>8} {'gain':>8} {'accuracy':>9}")

    def told(entry: dict[str, Any]) -> None:
        typer.echo(
            f"{entry['length']:>10,} {entry['loss_first']:>8.4f} {entry['loss_again']:>8.4f} {entry['gain']:>8.4f} "
            f"{entry['accuracy']:>9.1%}"
        )

    special = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    report = evaluate_induction(model, tokenizer.vocab_size, sizes, trials, seed, special, on_result=told)
    _written(
        output, "induction.json", {"settings": {**_settings(folder, model), "tokenizer": tokenizer.name}, **report}
    )


def lengths_of(text: str) -> list[int]:
    """Token counts such as 512, 4K or 1M, with commas between them.

    Raises:
        ValueError: one is no such number.
    """
    units = {"K": 1 << 10, "M": 1 << 20}
    found = []
    for part in text.split(","):
        digits, unit = part.strip().upper(), 1
        if digits and digits[-1] in units:
            digits, unit = digits[:-1], units[digits[-1]]
        if not digits.isdecimal() or int(digits) < 1:
            raise ValueError(f"--lengths {text}: {part!r} is no number of tokens, such as 512, 4K or 1M")
        found.append(int(digits) * unit)
    return found


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} {text}: give numbers with commas between them, such as 0,0.5,1") from None


def _text(source: str) -> Any:
    from megalodon.data import Corpus

    corpus = Corpus({"source": source})

    def pieces() -> Any:
        for document in corpus.documents():
            yield from document.pieces

    return pieces


def _settings(folder: Path, model: CausalLM) -> dict[str, Any]:
    import torch

    return {
        "model": str(folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "machine": platform.node(),
        "versions": {"megalodon": megalodon.__version__, "torch": torch.__version__},
    }


def _written(output: Path | None, name: str, report: dict[str, Any]) -> None:
    from megalodon.files import write_text

    if output is not None:
        write_text(output / name, json.dumps(report, indent=1) + "\n")
        typer.echo(f"written: {output / name}")
