"""A Transformer as it is, with other attention than it was trained with: the loss it costs by length, and its speed.

Contestants have the teacher's own weights: attention over everything; hip, whose searches find keys; the first keys
and a window; a window alone. Each reads the same texts in pieces. Loss is that of the second half of each length.
Contestants alternate text by text, so what a row says of speed holds against its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import chain, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save
from torch.nn import functional as F

from megalodon.convert.teachers import Teacher
from megalodon.data import Corpus, load_tokenizer
from megalodon.models import CausalLM

PIECE = 1024
DECODED = 16


def contestants(teacher: Teacher, keys: int) -> dict[str, CausalLM]:
    """By name; all but the first see at most about `keys` keys a query."""
    near = max(keys // 4, 1)
    hip = {"query_block": 16, "key_block": 2, "sinks": 4}
    given: dict[str, tuple[str, dict[str, Any]]] = {
        "attention": ("attention", {}),
        f"hip, {keys - near} found": ("hip", {**hip, "mask_size": (keys - near) // 2 * 2, "window": near}),
        f"4 first and {keys} last": ("hip", {**hip, "mask_size": 0, "window": keys}),
        f"{keys} last": ("sliding_attention", {"window": keys}),
    }
    return {name: teacher.with_attention(*how).model() for name, how in given.items()}


@torch.inference_mode()
def read(model: CausalLM, ids: torch.Tensor, lengths: list[int]) -> dict[int, tuple[float, float, float]]:
    """Length -> (loss of its second half, seconds of reading so far, seconds a token decoded there)."""
    state, seconds, losses, found = None, 0.0, [], {}
    for first in range(0, max(lengths), PIECE):
        piece = ids[:, first : first + PIECE]
        started = perf_counter()
        output = model(piece, past_key_values=state, use_cache=True)
        state = output.past_key_values
        seconds += perf_counter() - started
        targets = ids[0, first + 1 : first + piece.shape[1] + 1]
        losses += F.cross_entropy(output.logits[0, : len(targets)].float(), targets, reduction="none").tolist()
        end = first + piece.shape[1]
        if end in lengths:
            after = state
            started = perf_counter()
            for token in islice(ids[0].tolist(), DECODED):
                after = model(torch.tensor([[token]]), past_key_values=after, use_cache=True).past_key_values
            each = (perf_counter() - started) / DECODED
            found[end] = float(np.mean(losses[end // 2 : end])), seconds, each
    return found


def main(
    teacher: Annotated[Path, typer.Argument(help="the folder of a Llama, Mistral, Qwen2/3 or Phi")],
    text: Annotated[str, typer.Argument(help="held-out text: files, a folder, a dataset")],
    keys: Annotated[int, typer.Option(min=8, help="keys that a query sees")] = 256,
    lengths: Annotated[list[int] | None, typer.Option(help="tokens, multiples of 1024")] = None,
    texts: Annotated[int, typer.Option(min=1, help="how many pieces of text of the greatest length")] = 3,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Loss and speed by length, as JSON and a table."""
    sizes = sorted(lengths or [1024, 2048, 4096, 8192, 16384])
    if any(size % PIECE for size in sizes):
        raise typer.BadParameter(f"--lengths {sizes}: they must be multiples of {PIECE}")
    source = Teacher(teacher)
    tokenizer = load_tokenizer(teacher)
    stream = chain.from_iterable(document.pieces for document in Corpus({"source": text}).documents())
    wanted = texts * (sizes[-1] + 1)
    parts, count = [], 0
    for part in tokenizer.encode_stream(stream):
        parts.append(part)
        count += len(part)
        if count >= wanted:
            break
    if count < wanted:
        raise typer.BadParameter(f"the text has {count:,} tokens: {wanted:,} are needed")
    ids = torch.from_numpy(np.concatenate(parts)[:wanted]).view(texts, 1, -1)
    settings = {"teacher": source.model_type, "trained_length": source.length, "keys": keys, "texts": texts}
    result = new_run("training_free", describe_machine(512), settings)
    models, samples = contestants(source, keys), defaultdict(list)
    for row in ids:
        for name, model in models.items():
            for size, measured in read(model, row, sizes).items():
                samples[name, size].append(measured)
    result["samples"] = [{"name": name, "length": size, "rows": rows} for (name, size), rows in samples.items()]

    def table(cell: Any) -> str:
        rows = [[name, *(cell(name, size) for size in sizes)] for name in models]
        return markdown_table(["attention ", *(f"{size:,}" for size in sizes)], rows)

    parts_of_page = [
        f"A {source.model_type} of {source.config.num_layers} layers, trained on rows of {source.length:,} tokens; "
        f"{texts} texts.",
        "",
        "Loss of the second half, nats a token, less that of attention over everything in brackets:",
        "",
        table(lambda name, size: difference(samples, name, size)),
        "",
        "Reading, tokens a second:",
        "",
        table(lambda name, size: f"{size / median(row[1] for row in samples[name, size]):,.0f}"),
        "",
        "Decoding, milliseconds a token after so many:",
        "",
        table(lambda name, size: f"{1000 * median(row[2] for row in samples[name, size]):.2f}"),
    ]
    page = document("A Transformer with other attention than it was trained with", result, parts_of_page, False)
    typer.echo(save(result, page, output, "training_free")[1].read_text())


def difference(samples: Any, name: str, size: int) -> str:
    """A loss, and how it differs from attention's."""
    own, whole = (np.mean([row[0] for row in samples[one, size]]) for one in (name, "attention"))
    return f"{own:.3f}" if name == "attention" else f"{own:.3f} ({own - whole:+.3f})"


if __name__ == "__main__":
    typer.run(main)
