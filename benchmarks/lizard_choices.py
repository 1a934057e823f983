"""What Lizard's paper leaves open, measured: how near each choice brings a layer's heads to the teacher's in equally
many steps of attention transfer.

Each layer learns from the teacher's own inputs. The error is that of held-out rows: the squared distance of the heads'
outputs over their squares, the mean over layers; 1 is what heads that give nothing have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save

from megalodon.convert.teachers import Teacher
from megalodon.data import Corpus, load_tokenizer
from megalodon.linearize import Lesson, losses, read_config, recipe_of
from megalodon.linearize.activations import through
from megalodon.linearize.transfer import started
from megalodon.ops.layout import layout_of

CHOICES: dict[str, dict[str, Any]] = {
    "as the recipe has it": {},
    "queries and keys turn": {"rotary": True},
    "gate starts at sigmoid(0)": {"gate_bias": 0.0},
    "gate starts at sigmoid(2)": {"gate_bias": 2.0},
    "gate starts at sigmoid(6)": {"gate_bias": 6.0},
    "alpha starts at 0.5": {"alpha": 0.5},
    "alpha starts at 0.1": {"alpha": 0.1},
    "alpha rests at 1": {},
    "no sinks": {"sinks": 0},
    "turning, alpha from 0.5": {"rotary": True, "alpha": 0.5},
}


def lessons(source: Teacher, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what each layer's mixer reads, what its heads give) of rows [B, L]."""
    layout = layout_of(*ids.shape, ids.device)
    x, found = torch.nn.functional.embedding(ids, source.tensor("model.embed_tokens.weight")).float(), []
    with torch.no_grad():
        for layer in range(source.config.num_layers):
            block = source.block(layer, torch.device("cpu"), torch.float32)
            n = block.normalised(x)
            found.append((n, block.mixer.head_outputs(n, None, layout)[0]))
            x = through(block, x, layout)
    return found


def error(source: Teacher, choice: dict[str, Any], rest: str, data: list[Any], steps: int, window: int) -> float:
    """After so many steps, on the last rows of the data."""
    recipe = recipe_of("lizard")
    keys = [f"{name}={value}" for name, value in {"window": window, **choice}.items()]
    settings = read_config(recipe.config, None, [*keys, f"data.sequence_length={source.length}"])
    config = recipe.student_config(settings, source.config, [])
    total, rows = 0.0, len(data[0][0]) - max(1, len(data[0][0]) // 4)
    layout = layout_of(rows, source.length, torch.device("cpu"))
    held = layout_of(len(data[0][0]) - rows, source.length, torch.device("cpu"))
    for layer, (x, heads) in enumerate(data):
        block = source.block(layer, torch.device("cpu"), torch.float32)
        student = started(recipe, config, layer, block, 0)
        names = ("feature_map", "gate_proj", "alpha", "sinks")
        moved = [p for name, p in student.named_parameters() if name.startswith(names) and name != rest]
        for parameter in moved:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(moved, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(1.0, (step + 1) / max(1, steps // 10)) * (1 - 0.9 * step / steps)
            lesson = Lesson(layer, x[:rows], layout, block.mixer, student, heads[:rows])
            loss = losses.squared_distance(student.head_outputs(lesson.x, None, layout)[0], lesson.heads)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            optimizer.step()
        with torch.no_grad():
            found = student.head_outputs(x[rows:], None, held)[0]
            total += float((found - heads[rows:]).square().sum() / heads[rows:].square().sum())
    return total / len(data)


def main(
    teacher: Annotated[Path, typer.Argument(help="the folder of a Llama, Mistral, Qwen2/3 or Phi")],
    text: Annotated[str, typer.Argument(help="files, a folder, a dataset")],
    rows: Annotated[int, typer.Option(min=4, help="of the teacher's length; a quarter is held out")] = 16,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    window: Annotated[int, typer.Option(min=1)] = 32,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """The error after equally many steps, as JSON and a table."""
    source, tokenizer = Teacher(teacher), load_tokenizer(teacher)
    parts, count = [], 0
    for part in tokenizer.encode_stream(p for one in Corpus({"source": text}).documents() for p in one.pieces):
        parts.append(part)
        count += len(part)
        if count >= rows * source.length:
            break
    ids = torch.from_numpy(np.concatenate(parts)[: rows * source.length]).view(rows, source.length)
    settings = {"teacher": source.model_type, "rows": rows, "length": source.length, "steps": steps, "window": window}
    result = new_run("lizard_choices", describe_machine(512), settings)
    data = lessons(source, ids)
    result["errors"] = {}
    for name, choice in CHOICES.items():
        result["errors"][name] = error(source, choice, "alpha" if "rests" in name else "", data, steps, window)
        typer.echo(f"{name}: {result['errors'][name]:.4f}", err=True)
    table = markdown_table(["choice ", "error"], [[name, f"{value:.4f}"] for name, value in result["errors"].items()])
    told = f"A {source.model_type} of {source.config.num_layers} layers, {steps} steps on {rows} rows, window {window}."
    page = document("What Lizard's paper leaves open", result, [told, "", table], False)
    typer.echo(save(result, page, output, "lizard_choices")[1].read_text())


if __name__ == "__main__":
    typer.run(main)
