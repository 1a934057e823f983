"""`megalodon generate`: continue a prompt, a file or standard input of any length."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from megalodon.choices import RunDtype

if TYPE_CHECKING:
    from megalodon.data import Tokenizer
    from megalodon.inference import Session
    from megalodon.models import CausalLM

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="a model's folder")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="the text to continue; - for standard input")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="read the prompt from this file; - for standard input")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="tokens to generate; 0 only reads")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(help="keep the K likeliest tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="keep the likeliest tokens of this probability in all; 1: all")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="keep tokens of at least this share of the likeliest one's; 0: all")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="penalise the last 256 tokens; 1: off")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this string; may be given several times")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling; random, or the context's, if not given")] = None,
    context: Annotated[Path | None, typer.Option(help="go on from this saved context")] = None,
    save_context: Annotated[Path | None, typer.Option(help="save the context here afterwards")] = None,
    context_storage: Annotated[
        str, typer.Option(help="exact; int8 or fp8: a quarter of the bytes, and a little lost")
    ] = "exact",
    tokenizer_name: Annotated[str | None, typer.Option("--tokenizer", help="if the model's folder holds none")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if not given")] = None,
    dtype: Annotated[RunDtype | None, typer.Option(help="that of the weights if not given; int8: for a CPU")] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="MODEL is a Transformer of another library, such as a Llama: read it as it is, with attention, hip "
            "(keys that a search finds) or sliding_attention"
        ),
    ] = None,
    attention_parameter: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="of --attention, such as mask_size=256; repeatable")
    ] = None,
) -> None:
    """Continue a text. It goes to standard output as it is made, statistics go to standard error."""
    from megalodon.inference import (
        Context,
        Sampling,
        Session,
        StopStrings,
        generate_text,
        load_model,
        load_tokenizer_for,
    )
    from megalodon.inference.loading import torch_dtype
    from megalodon.models.storage import check_storage

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    StopStrings(stop or ())  # refuses an empty one before work starts
    text = prompt_text(prompt, prompt_file, required=context is None)
    if save_context is not None and not save_context.absolute().parent.is_dir():
        raise FileNotFoundError(f"--save-context: no folder {save_context.absolute().parent}")
    storage = check_storage(context_storage)
    if attention is None:
        if attention_parameter:
            raise ValueError("--attention-parameter: it goes with --attention")
        model = load_model(folder, device, torch_dtype(dtype))
    else:
        model = transformer(folder, attention, attention_parameter or [], device, dtype)
    tokenizer = load_tokenizer_for(model, folder, tokenizer_name)
    start = None if context is None else Context.load(context, model, tokenizer)
    session = Session(model, start, seed, vocab_size=tokenizer.vocab_size)
    read(session, tokenizer, text)
    write(generate_text(session, tokenizer, max_tokens, sampling, stop or (), save_context is not None), session)
    if save_context is not None:
        session.context.save(save_context, model, tokenizer, storage)


def transformer(folder: Path, attention: str, given: list[str], device: str | None, dtype: str | None) -> CausalLM:
    """The Transformer in a folder, with another attention. Nothing is trained."""
    import yaml

    from megalodon.convert.teachers import Teacher
    from megalodon.inference.loading import choose_device, torch_dtype

    if dtype == RunDtype.int8:
        raise ValueError("--dtype int8: with --attention it must be float32 or bfloat16")
    parameters = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--attention-parameter {text}: it must be KEY=VALUE")
        parameters[name] = yaml.safe_load(value)
    return Teacher(folder).with_attention(attention, parameters).model(choose_device(device), torch_dtype(dtype))


def prompt_text(prompt: str | None, prompt_file: str | None, required: bool) -> Iterator[str]:
    """The prompt in pieces, from wherever it is."""
    from megalodon.data import TextFile, read_text

    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt-file: a prompt was given as well; give one of them")
    if "-" in (prompt, prompt_file):
        return read_text(sys.stdin.buffer, "standard input")
    if prompt_file is not None:
        if not Path(prompt_file).is_file():
            raise FileNotFoundError(f"--prompt-file: no file {prompt_file}")
        return iter(TextFile(Path(prompt_file)))
    if not prompt and required:
        raise ValueError("no prompt: give a text, --prompt-file, - for standard input, or --context")
    return iter([prompt] if prompt else [])


def read(session: Session, tokenizer: Tokenizer, text: Iterator[str]) -> None:
    """Read the prompt, showing on a terminal how far it is; then the statistics."""
    before, started = session.tokens, time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("reading the prompt: {task.completed:,.0f} tokens"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=None)
        session.read(tokenizer.encode_stream(text), lambda tokens: progress.advance(task, tokens))
    if session.tokens == 0:
        raise ValueError("the prompt is empty: give at least one character")
    if session.tokens > before:
        report("prompt", session.tokens - before, time.perf_counter() - started)


def write(pieces: Iterator[str], session: Session) -> None:
    """Print the text as it comes. Ctrl-C ends it early, as if the last token had been the last one asked for."""
    before, started = session.tokens, time.perf_counter()
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    seconds = time.perf_counter() - started
    if sys.stdout.isatty():  # in a pipe or a file the text stays exactly what was generated
        print()
    report("generated", session.tokens - before, seconds)


def report(what: str, tokens: int, seconds: float) -> None:
    """One line of statistics on standard error."""
    print(
        f"{what}: {tokens:,} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)", file=sys.stderr
    )
