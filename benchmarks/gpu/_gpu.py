"""What the GPU benchmarks share: the card's two ceilings, timing, comparisons of one run, results on disk."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import typer
from _report import RESULTS, markdown_table, new_run, write_atomically
from torch import Tensor

import megalodon

__all__ = ["Ceilings", "error", "finish", "markdown_table", "milliseconds", "require_gpu", "rotating", "start"]


class Ceilings:
    """What this card does: bytes per second of a copy (read plus written) and bfloat16 FLOP per second of a product."""

    def __init__(self) -> None:
        source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / (milliseconds(partial(target.copy_, source))[0] / 1e3)
        del source, target
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.matrix_rate = 2 * 8192**3 / (milliseconds(partial(torch.matmul, a, b))[0] / 1e3)

    def memory_floor(self, nbytes: float) -> float:
        """Milliseconds to move so many bytes."""
        return nbytes / self.bandwidth * 1e3

    def matrix_floor(self, flops: float) -> float:
        """Milliseconds to do so many floating-point operations in tensor cores."""
        return flops / self.matrix_rate * 1e3


def require_gpu() -> None:
    """Ends the program with a clear message where there is no GPU."""
    if not torch.cuda.is_available():
        typer.echo("this benchmark needs a CUDA device: none is available", err=True)
        raise typer.Exit(2)


def milliseconds(call: Callable[[], Any], repeats: int = 30) -> tuple[float, float]:
    """(median, spread) of `repeats` calls after warming up; the spread is half the distance of the 20th and 80th
    percentiles.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in marks)
    return statistics.median(times), (times[int(0.8 * (repeats - 1))] - times[int(0.2 * (repeats - 1))]) / 2


def rotating(make: Callable[[], Any], count: int = 3) -> Callable[[], Any]:
    """Gives one of several sets of inputs in turn, so that no call finds its own in the cache."""
    sets, turn = [make() for _ in range(count)], 0

    def following() -> Any:
        nonlocal turn
        turn = (turn + 1) % count
        return sets[turn]

    return following


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected values; NaN stays NaN."""
    a, e = (torch.view_as_real(x) if x.is_complex() else x for x in (actual, expected))
    return float((a.double().cpu() - e.double().cpu()).norm() / e.double().cpu().norm().clamp_min(1e-30))


def start(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Ceilings]:
    """The head of a result, with the card's ceilings measured now."""
    require_gpu()
    ceilings = Ceilings()
    properties = torch.cuda.get_device_properties(0)
    machine = {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "copy_bytes_per_second": ceilings.bandwidth,
        "matrix_flop_per_second": ceilings.matrix_rate,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "megalodon": megalodon.__version__,
    }
    return new_run(f"gpu/{name}", machine, settings), ceilings


def finish(result: dict[str, Any], name: str, title: str, tables: Sequence[str], output: Path = RESULTS) -> None:
    """Writes `gpu_NAME-CARD.json` and `.md` and prints the page."""
    output.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", result["machine"]["gpu"].lower()).strip("-")
    machine = result["machine"]
    head = [
        *(f"# {title}", "", f"`{' '.join(result['command'])}`, {result['started']}, run {result['run'][:8]}", ""),
        f"{machine['gpu']}, PyTorch {machine['torch']}, Triton {machine['triton']}; a copy moves "
        f"{machine['copy_bytes_per_second'] / 1e12:.2f} TB/s (read and written), an 8192-square bfloat16 product "
        f"runs at {machine['matrix_flop_per_second'] / 1e12:.0f} TFLOP/s. Floors are computed from these two.",
        "",
    ]
    page = "\n".join([*head, *tables]).rstrip() + "\n"
    write_atomically(output / f"gpu_{name}-{card}.json", json.dumps(result, indent=1) + "\n")
    write_atomically(output / f"gpu_{name}-{card}.md", page)
    typer.echo(page)
