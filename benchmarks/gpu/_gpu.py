"""What the GPU benchmarks share: the device, timing, the card's two ceilings, rows that may fail, results on disk.

Import it before anything of Triton's or megalodon's. `--rehearse` on the command line makes the device a CPU and runs
the kernels in Triton's interpreter, which Triton decides when it is imported: tiny sizes, no CUDA graphs, nothing
written unless `--output` names a folder.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("MEGALODON_BACKEND", "triton")  # the library's own default is still the plain form

import torch
import triton
import typer
from _report import RESULTS, markdown_table, new_run, write_atomically
from torch import Tensor

import megalodon
from megalodon.ops.backend import backend_for

REHEARSAL = "--rehearse" in sys.argv
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
COMPILER: dict[str, Any] = {"dynamic": False, "backend": "aot_eager" if REHEARSAL else "inductor"}
"""How everything that is compiled is: for the one shape it is timed at; in a rehearsal without generating code."""

WARNING = "**Rehearsal on a CPU, kernels interpreted: it shows that the script works; its numbers mean nothing.**"

Rehearse = Annotated[bool, typer.Option("--rehearse", help="Tiny sizes on a CPU: shows that the script works.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder for the results. [default: benchmarks/results; none in a rehearsal]")
]


class LeftOut(Exception):
    """Why a row has no numbers, where that is nobody's fault: a package is missing, a card is too small."""


# Time and memory -----------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], repeats: int = 30, seconds: float = 1.0) -> tuple[float, float]:
    """(median, spread) of at most `repeats` calls, of fewer but three at least if those take longer than `seconds`.

    Two calls go before them: the first compiles, the second says how long one takes. The spread is half the distance of
    the 20th and 80th percentiles. A rehearsal calls once.
    """
    if REHEARSAL:
        return _host_times(call, 1)[0], 0.0
    call()
    synchronize()
    begin = perf_counter()
    call()
    synchronize()
    once = perf_counter() - begin
    repeats = max(3, min(repeats, int(seconds / once)))
    times = sorted((_device_times if DEVICE.type == "cuda" else _host_times)(call, repeats))
    return statistics.median(times), (times[int(0.8 * (repeats - 1))] - times[int(0.2 * (repeats - 1))]) / 2


def _device_times(call: Callable[[], Any], repeats: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def _host_times(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - begin))
    return times


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of `call` from a CUDA graph, warmed up on a side stream; on a CPU the call itself."""
    if DEVICE.type != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rotating(make: Callable[[], Any], count: int = 3) -> Callable[[], Any]:
    """Gives one of several sets of inputs in turn, so that no call finds its own in the cache."""
    sets, turn = [make() for _ in range(count)], 0

    def following() -> Any:
        nonlocal turn
        turn = (turn + 1) % count
        return sets[turn]

    return following


def peak_memory(reset: bool = False) -> int:
    """Most bytes held since the last reset; on a CPU, which has no such counter, those of the process so far."""
    if DEVICE.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def free_memory() -> float:
    """Bytes that can still be had, those that PyTorch holds in reserve included; without end on a CPU."""
    if DEVICE.type != "cuda":
        return float("inf")
    gc.collect()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


class Ceilings:
    """What this card does: bytes per second of a copy (read plus written) and bfloat16 FLOP per second of a product."""

    def __init__(self) -> None:
        numbers, side = (2**16, 64) if REHEARSAL else (2**30, 8192)
        source = torch.randn(numbers, device=DEVICE, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / (milliseconds(partial(target.copy_, source))[0] / 1e3)
        del source, target
        a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.matrix_rate = 2 * side**3 / (milliseconds(partial(torch.matmul, a, b))[0] / 1e3)

    def memory_floor(self, nbytes: float) -> float:
        """Milliseconds to move so many bytes."""
        return nbytes / self.bandwidth * 1e3

    def matrix_floor(self, flops: float) -> float:
        """Milliseconds to do so many floating-point operations in tensor cores."""
        return flops / self.matrix_rate * 1e3


def require_device() -> None:
    """Ends the program with status 2 and a message, where there is no GPU or the kernels would be interpreted on it."""
    if REHEARSAL:
        return
    if not torch.cuda.is_available():
        typer.echo("this benchmark needs a CUDA device: none is available (--rehearse does without)", err=True)
        raise typer.Exit(2)
    if os.environ.get("TRITON_INTERPRET") == "1":
        typer.echo("TRITON_INTERPRET=1 would interpret the kernels: unset it to measure", err=True)
        raise typer.Exit(2)


@cache
def ceilings() -> Ceilings:
    """This card's, measured once a process; ends the program where there is none."""
    require_device()
    return Ceilings()


# Numbers and rows ----------------------------------------------------------------------------------------------------


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected values; NaN stays NaN."""
    a, e = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (actual.detach(), expected.detach()))
    return float((a.double().cpu() - e.double().cpu()).norm() / e.double().cpu().norm().clamp_min(1e-30))


def attempt(run: Callable[[], dict[str, Any]], **names: Any) -> dict[str, Any]:
    """A row: its names, then what `run` found and the memory it took, or what prevented it.

    Memory that is too small and a package that is missing are findings, under `note`. Anything else is an error, under
    `failed`, and does not end the script either, unless the device itself is lost.
    """
    peak_memory(reset=True)
    try:
        return {**names, **run(), "peak_gib": peak_memory() / 2**30}
    except torch.OutOfMemoryError:
        found = {"note": "out of memory"}
    except LeftOut as reason:
        found = {"note": str(reason)}
    except Exception as reason:  # every row is worth having without the others
        traceback.print_exc()
        found = {"failed": f"{type(reason).__name__}: {reason}".splitlines()[0][:160]}
    free_memory()
    synchronize()
    return {**names, **found}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a column for each key of any row; what went wrong stands last."""
    last = ("note", "failed")
    every = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in every if key not in last] + [key for key in last if key in every]
    numeric = {key for key in keys if any(_is_number(row.get(key)) for row in rows)}
    header = [key.replace("_", " ") + ("" if key in numeric else " ") for key in keys]
    return markdown_table(header, [[_cell(row.get(key, "")) for key in keys] for row in rows])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Results -------------------------------------------------------------------------------------------------------------


class Report:
    """`gpu_NAME-CARD.json` and `.md`, written anew after every row, so that whoever is killed loses one row only."""

    def __init__(self, name: str, title: str, settings: dict[str, Any], output: Path | None) -> None:
        found = ceilings()
        self.name, self.title = name, title
        self.folder = output if output is not None or REHEARSAL else RESULTS
        self.result = new_run(f"gpu/{name}", {**_machine(), **vars(found)}, settings)
        self.sections: dict[str, list[dict[str, Any]]] = {}
        self.result["sections"] = self.sections

    def add(self, section: str, row: dict[str, Any]) -> None:
        """One more row, printed and kept."""
        self.sections.setdefault(section, []).append(row)
        typer.echo(f"{section}: " + ", ".join(f"{key} {_cell(value)}" for key, value in row.items()), err=True)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            stem = f"gpu_{self.name}-{self.card}"
            write_atomically(self.folder / f"{stem}.json", json.dumps(self.result, indent=1) + "\n")
            write_atomically(self.folder / f"{stem}.md", self.page)

    @property
    def card(self) -> str:
        """The card's name, as it stands in names of files."""
        return re.sub(r"[^a-z0-9]+", "-", self.result["machine"]["gpu"].lower()).strip("-")

    @property
    def page(self) -> str:
        """Title, card and ceilings, a table for each section."""
        result, machine = self.result, self.result["machine"]
        parts = [f"# {self.title}", "", *([WARNING, ""] if REHEARSAL else [])]
        parts += [f"`{' '.join(result['command'])}`, {result['started']}, run {result['run'][:8]}", ""]
        parts += [
            f"{machine['gpu']}, PyTorch {machine['torch']}, Triton {machine['triton']}; Megalodon's operators: "
            f"{machine['backend']}. A copy moves {machine['bandwidth'] / 1e12:.2f} TB/s (read and written), an "
            f"8192-square bfloat16 product runs at {machine['matrix_rate'] / 1e12:.0f} TFLOP/s: floors are computed "
            "from these two. Times are medians in milliseconds after warming up; spread is half the distance of their "
            "20th and 80th percentiles.",
            "",
        ]
        for section, rows in self.sections.items():
            parts += [f"## {section}", "", table(rows), ""]
        return "\n".join(parts).rstrip() + "\n"

    def finish(self) -> bool:
        """Prints the page; whether every row that ran is right."""
        typer.echo(self.page)
        rows = [row for rows in self.sections.values() for row in rows]
        return not any("failed" in row or row.get("right") is False for row in rows)


def _machine() -> dict[str, Any]:
    head = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "megalodon": megalodon.__version__,
        "backend": backend_for(DEVICE, torch.bfloat16)[0],
    }
    if REHEARSAL:
        return {"gpu": "rehearsal", **head}
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "gpu": properties.name,
        "compute_capability": capability,
        "memory_bytes": properties.total_memory,
        **head,
    }
