"""The loss that weights in int8 cost a trained model: in float32 and in int8, each token of one text after all before.

    python benchmarks/int8_loss.py RUN --text held-out.txt --output int8_loss

RUN is a model's folder or a training run. Losses are nats a token, over the same tokens, so that their difference is
what int8 costs; its standard error is over parts of 128 tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, new_run, save

from megalodon.inference.loading import load_model, load_tokenizer_for

PIECE = 2048


@torch.no_grad()
def losses(folder: Path, dtype: torch.dtype | None, tokens: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first, float64."""
    model, state, found = load_model(folder, "cpu", dtype), None, []
    for piece in range(0, tokens.shape[1] - 1, PIECE):
        given = tokens[:, piece : min(piece + PIECE, tokens.shape[1] - 1)]
        output = model(given, past_key_values=state, use_cache=True)
        state = output.past_key_values
        targets = tokens[0, piece + 1 : piece + 1 + given.shape[1]]
        found.append(torch.nn.functional.cross_entropy(output.logits[0].double(), targets, reduction="none"))
    return torch.cat(found)


def main(
    folder: Annotated[Path, typer.Argument(help="a model's folder, or a training run")],
    text: Annotated[Path, typer.Option(help="a file of text that the model was not trained on")],
    characters: Annotated[int, typer.Option(help="of the text's beginning")] = 100_000,
    output: Annotated[str, typer.Option(help="name of the files in results/; empty for none")] = "",
) -> None:
    """Measure."""
    model = load_model(folder, "cpu")
    tokenizer = load_tokenizer_for(model, folder)
    ids = tokenizer.encode(text.read_text()[:characters])
    tokens = torch.tensor([list(ids)])
    wide, narrow = (losses(folder, dtype, tokens) for dtype in (torch.float32, torch.int8))
    cost = (narrow - wide)[: len(wide) // 128 * 128].view(-1, 128).mean(1)
    error = float(cost.std()) / math.sqrt(len(cost))
    parameters = sum(p.numel() for p in model.parameters())
    rows = [
        "| parameters | tokens | float32, nats | int8, nats | int8 costs | standard error |",
        "| --: | --: | --: | --: | --: | --: |",
        f"| {parameters:,} | {len(wide):,} | {wide.mean():.5f} | {narrow.mean():.5f} | "
        f"{(narrow - wide).mean():+.5f} | {error:.5f} |",
    ]
    print("\n".join(rows))
    if output:
        result = new_run("int8_loss", describe_machine(512), {"text": text.name, "characters": characters})
        result |= {"float32": float(wide.mean()), "int8": float(narrow.mean()), "tokens": len(wide)}
        result |= {"parameters": parameters, "standard_error": error, "model": folder.name}
        save(result, document("The loss that int8 costs", result, ["\n".join(rows)], False), RESULTS, output)


if __name__ == "__main__":
    typer.run(main)
