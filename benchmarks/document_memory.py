"""Peak memory of `evaluate perplexity` over a long document, beside the same evaluation of its first 64K tokens.

Each length runs in a process of its own, which loads the model, reads the document as bytes from its file and reports
the highest resident memory that the system saw of it. The model has random weights: memory does not depend on them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save
from _workloads import build_megalodon

from megalodon.data import Document, load_tokenizer
from megalodon.evaluation import evaluate_perplexity

SHORT = 1 << 16
TARGET = 1.05
READ_AT_ONCE = 1 << 16


def measure(path: Path, max_tokens: int | None) -> dict[str, Any]:
    """Evaluates in this process: tokens, seconds, and resident bytes before and at the highest."""
    torch.manual_seed(0)
    model, tokenizer = build_megalodon().model.eval(), load_tokenizer("bytes")
    model(torch.zeros(1, 2 * model.config.chunk_size, dtype=torch.int64))  # what the first call allocates for good
    before, start = peak_bytes(), perf_counter()
    with path.open(encoding="utf-8") as file:
        text = iter(lambda: file.read(READ_AT_ONCE), "")
        report = evaluate_perplexity(model, tokenizer, [Document(path.name, text)], max_tokens=max_tokens)
    tokens = report["overall"]["tokens"] + 1
    return {"tokens": tokens, "seconds": perf_counter() - start, "bytes_before": before, "bytes_peak": peak_bytes()}


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_own_process(path: Path, max_tokens: int | None) -> dict[str, Any]:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, __file__, str(path), "--child", "--max-tokens", str(max_tokens or 0)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A long text file.")],
    max_tokens: Annotated[int, typer.Option(min=0, help="Read only so many tokens; 0: all.")] = 0,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measures 64K tokens and all, writes JSON and a table; exit status 1 if all of it takes over 5 % more memory."""
    if child:
        typer.echo(json.dumps(measure(path, max_tokens or None)))
        return
    result = new_run("document_memory", describe_machine(), {"document": path.name, "short": SHORT, "target": TARGET})
    result["command"][2] = path.name
    result["runs"] = runs = [in_own_process(path, SHORT), in_own_process(path, max_tokens or None)]
    ratio = runs[1]["bytes_peak"] / runs[0]["bytes_peak"]
    result["ratio"] = ratio
    rows = [
        [f"{r['tokens']:,}", *(f"{r[key] / 1e6:.0f}" for key in ("bytes_before", "bytes_peak")), f"{r['seconds']:.0f}"]
        for r in runs
    ]
    table = markdown_table(["tokens", "MB before", "MB at the peak", "seconds"], rows)
    verdict = f"Peak over that at {SHORT:,} tokens: {ratio:.3f} (target: at most {TARGET})."
    parts = [f"{path.name} as bytes through the 16 M-parameter model, float32.", "", table, "", verdict]
    page = document("Memory of evaluating a long document", result, parts, quick=False)
    typer.echo(save(result, page, output, "document_memory")[1].read_text())
    if ratio > TARGET:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
