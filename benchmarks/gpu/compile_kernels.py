"""Compiles every Triton kernel for sm_80 and sm_90 as the library launches it; reports what each takes.

Needs Triton, no GPU. The operators are called as ever, at the shapes of the presets, on the CPU: in place of a driver
stands one that knows its architecture and no more, and a launch ends when its kernel is compiled. So each kernel meets
the arguments, dtypes and block sizes of a real call; what comes out of the operators is whatever memory held.

Writes `results/gpu_kernels.json` and `.md`, with digests of the sources, by which a test sees whether they are those of
today. Exit status 1 if a kernel spills, takes more shared memory than there is,
or is never launched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled: they become so when imported

import torch
import triton
import typer
from _kernel_sources import digests
from _report import RESULTS, markdown_table, write_atomically
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from megalodon import ops
from megalodon.ops import launch
from megalodon.ops.cema import triton_kernels as cema_kernels
from megalodon.ops.chunk_attention import strip_kernels
from megalodon.ops.chunk_attention import triton as attention
from megalodon.ops.chunk_attention import triton_kernels as attention_kernels
from megalodon.ops.timestep_decay_norm import triton_kernels as decay_norm_kernels
from megalodon.ops.timestep_norm import triton_kernels as norm_kernels

os.environ["TRITON_INTERPRET"] = "1"  # from now on only the library asks, and takes tensors of the CPU

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
MODULES = (cema_kernels, norm_kernels, decay_norm_kernels, attention_kernels, strip_kernels)


# Launches that compile -----------------------------------------------------------------------------------------------


@dataclass
class Driver:
    """What Triton asks of a driver before it compiles; it numbers devices by their capability."""

    capability: int

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclass
class Recorder:
    """The compiled kernels, each with the case that launched it first."""

    capability: int
    case: str = ""
    found: dict[int, tuple[str, str, Any]] = field(default_factory=dict)

    def see(self, name: str, kernel: Any) -> None:
        self.found.setdefault(id(kernel), (name, self.case, kernel))


@contextmanager
def recording(capability: int) -> Iterator[Recorder]:
    """Launches compile for this capability and run nothing."""
    recorder, run, of_device = Recorder(capability), JITFunction.run, launch.capability

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **named)
        recorder.see(self.__name__, kernel)
        return kernel

    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    launch.capability = lambda x: divmod(capability, 10)
    try:
        yield recorder
    finally:
        JITFunction.run, launch.capability = run, of_device


def resources(kernel: Any, capability: int) -> dict[str, Any]:
    """Of one compiled kernel, as ptxas reports them, and the length of its longest loop."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(kernel.asm["ptx"])
        ptxas = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={ARCHITECTURES[capability]}", str(ptx)]
        run = subprocess.run([*ptxas, "-o", str(cubin)], capture_output=True, text=True, check=True)
        disassemble = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return {
        "architecture": ARCHITECTURES[capability],
        "warps": kernel.metadata.num_warps,
        "registers": _number(r"Used (\d+) registers", run.stderr),
        "spilled": sum(_number(rf"(\d+) bytes spill {way}", run.stderr) for way in ("stores", "loads")),
        "shared": kernel.metadata.shared,
        "loop": longest_loop(code),
        "tensor_core_instructions": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", kernel.asm["ptx"])),
        "asynchronous_copies": len(re.findall(r"\bcp\.async\.c[ag]|cp\.async\.bulk", kernel.asm["ptx"])),
    }


def longest_loop(code: str) -> int:
    """Instructions between the targets of backward branches and these, at most: a warp issues one a cycle at best."""
    addresses = [int(address, 16) for address in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", code, re.MULTILINE)]
    branches = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/.*?\bBRA\b[^;]*?\b0x([0-9a-f]+)", code, re.MULTILINE)
    ranges = [(int(target, 16), int(source, 16)) for source, target in branches]
    return max((sum(first <= a <= last for a in addresses) for first, last in ranges if first < last), default=0)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas reported nothing like {pattern!r}:\n{text}")
    return int(found.group(1))


# Calls ---------------------------------------------------------------------------------------------------------------


def there_and_back(run: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Forward and backward, with gradients of all inputs and outputs."""
    outputs = run(**inputs)
    outputs = [o for o in ((outputs,) if isinstance(outputs, Tensor) else outputs) if o.requires_grad]
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def documents(batch: int, length: int) -> Tensor:
    """Four in each row, none as long as another."""
    return torch.bucketize(torch.arange(length), torch.tensor([length // 9, length // 4, length // 2])).repeat(batch, 1)


def cema_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    dim, components, length = 4096, 16, 4096
    coefficients = {
        "p": leaf(dim, components),
        **{name: leaf(dim, components, dtype=torch.complex64) for name in ("q", "gamma")},
        "omega": leaf(dim),
    }
    state = {"initial_state": leaf(1, dim, components, dtype=torch.complex64)}
    run = partial(ops.cema, backend="triton")
    x = {"x": leaf(1, length, dim, dtype=dtype)}
    yield "new", lambda: there_and_back(run, x | coefficients)
    carried = x | coefficients | state | {"segment_ids": documents(1, length)}
    yield "state and documents", lambda: there_and_back(run, carried)
    token = {"x": leaf(1, 1, dim, dtype=dtype)} | coefficients | state
    yield "one token", lambda: torch.no_grad()(run)(**token)


def norm_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    dim = 4096
    affine = {"weight": leaf(dim), "bias": leaf(dim)}
    for groups in (64, dim):
        run = partial(ops.timestep_norm, num_groups=groups, backend="triton")
        long, short = {"x": leaf(1, 4096, dim, dtype=dtype)}, {"x": leaf(8, 64, dim, dtype=dtype)}
        yield f"long rows, G={groups}", lambda run=run, x=long: there_and_back(run, x | affine)
        yield f"short rows, G={groups}", lambda run=run, x=short: there_and_back(run, x | affine)
        statistics = {name: leaf(8, groups, dtype=torch.float64) for name in ("mean", "var")}
        carried = short | affine | statistics | {"count": torch.ones(8, dtype=torch.int64)}
        packed = carried | {"segment_ids": documents(8, 64), "padding_mask": torch.zeros(8, 64, dtype=torch.bool)}
        yield f"statistics and documents, G={groups}", lambda run=run, x=packed: there_and_back(run, x)


def decay_norm_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    dim = 4096
    affine = {"weight": leaf(dim), "bias": leaf(dim)}
    for groups in (64, 1):
        run = partial(ops.timestep_decay_norm, num_groups=groups, backend="triton")
        long, short = {"x": leaf(1, 4096, dim, dtype=dtype)}, {"x": leaf(8, 64, dim, dtype=dtype)}
        yield f"long rows, G={groups}", lambda run=run, x=long: there_and_back(run, x | affine)
        statistics = {name: leaf(8, groups, dtype=torch.float64) for name in ("mean", "var")}
        carried = short | affine | statistics | {"count": torch.ones(8, dtype=torch.int64)}
        packed = carried | {"segment_ids": documents(8, 64), "padding_mask": torch.zeros(8, 64, dtype=torch.bool)}
        yield f"statistics and documents, G={groups}", lambda run=run, x=packed: there_and_back(run, x)


def attention_cases(dtype: torch.dtype, form: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    heads, key, value, length = 4, attention.WIDEST_KEY[dtype], 2048, 640
    widths = {"q": key, "k": key, "v": value}
    inputs = {name: leaf(1, length, heads, width, dtype=dtype) for name, width in widths.items()}
    prefix = {f"prefix_{name}": leaf(1, 96, heads, widths[name], dtype=dtype) for name in ("k", "v")}
    run = partial(ops.chunk_attention, chunk_size=length, backend=form)
    yield "new", lambda: there_and_back(run, inputs)
    yield "documents", lambda: there_and_back(run, inputs | {"segment_ids": documents(1, length)})
    yield "dropout", lambda: there_and_back(partial(run, dropout=0.1), inputs)
    yield "dropkey", lambda: there_and_back(partial(run, dropout=0.1, dropkey=True), inputs)
    if form == "triton-fused":
        yield "open chunk", lambda: there_and_back(run, inputs | prefix)
        token = {**inputs, "q": leaf(1, 1, heads, key, dtype=dtype)}
        for name, offset in (("one place", 500), ("a place for each row", torch.tensor([500]))):
            step = torch.no_grad()(partial(ops.causal_attention, offset=offset, backend="triton"))
            yield f"one token, {name}", lambda step=step: step(**token)


def window_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    heads, key, value, length, chunk = 4, attention.WIDEST_KEY[dtype], 2048, 640, 256
    widths = {"q": key, "q_before": key, "k": key, "v": value}
    inputs = {name: leaf(1, length, heads, width, dtype=dtype) for name, width in widths.items()}
    kept = {"before": chunk, "open": 96}
    prefix = {f"{p}_{n}": leaf(1, kept[p], heads, widths[n], dtype=dtype) for p in kept for n in ("k", "v")}
    bos = {"bos_mask": torch.arange(length)[None] % 100 == 0}
    run = partial(ops.sliding_chunk_attention, chunk_size=chunk, backend="triton")
    yield "new", lambda: there_and_back(run, inputs)
    yield "carried chunks and segments", lambda: there_and_back(run, inputs | prefix | bos)
    yield "dropkey", lambda: there_and_back(partial(run, dropout=0.1, dropkey=True), inputs)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that launches kernels: bfloat16 and float32, D = 4096, N = 16, H = 4, q and k 256, v 2048."""
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for operator, found in (
            ("cema", cema_cases(dtype)),
            ("timestep_norm", norm_cases(dtype)),
            ("timestep_decay_norm", decay_norm_cases(dtype)),
            ("attention, fused", attention_cases(dtype, "triton-fused")),
            ("attention, strips", attention_cases(dtype, "triton-strips")),
            ("window", window_cases(dtype)),
        ):
            for case, call in found:
                yield f"{operator}, {name}: {case}", call


# The report ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "kernel": "kernel ",
    "case": "first launched for ",
    "architecture": "architecture ",
    "warps": "warps",
    "registers": "registers",
    "spilled": "spilled bytes",
    "shared_kib": "shared KiB",
    "loop": "longest loop",
    "tensor_core_instructions": "tensor-core instr.",
    "asynchronous_copies": "async copies",
}


def page(rows: list[dict[str, Any]]) -> str:
    cells = [[str(r[name]) for name in COLUMNS] for r in rows]
    return "\n".join(
        [
            "# Resources of the GPU kernels",
            "",
            f"`python benchmarks/gpu/compile_kernels.py`, Triton {triton.__version__}: compiled as launched, not run.",
            "Registers are per thread; the longest loop in machine instructions, the other instructions as in the PTX.",
            "",
            markdown_table(list(COLUMNS.values()), cells),
            "",
        ]
    )


def measured(only: str) -> Iterator[dict[str, Any]]:
    """A row for each kernel and architecture, in order of its first launch."""
    for capability in ARCHITECTURES:
        with recording(capability) as recorder:
            for case, call in cases():
                if only in case:
                    recorder.case = case
                    call()
            for name, case, kernel in recorder.found.values():
                found = resources(kernel, capability)
                fits = found["shared"] <= SHARED_LIMITS[capability]
                yield {"kernel": name, "case": case, **found, "shared_kib": found["shared"] / 1024, "fits": fits}


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
    only: Annotated[str, typer.Option(help="Cases whose name contains this; nothing is written.")] = "",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Single tokens only: shows that the script works.")
    ] = False,
) -> None:
    """Compiles, prints the table, writes JSON and Markdown."""
    rows = []
    for row in measured(only):
        rows.append(row)
        typer.echo(f"{row['kernel']}, {row['case']}, {row['architecture']}: {row['registers']} registers", err=True)
    wrong = [row["kernel"] for row in rows if row["spilled"] or not row["fits"]]
    if not only:
        every = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
        wrong += sorted(every - {row["kernel"] for row in rows})
        output.mkdir(parents=True, exist_ok=True)
        kept = {"triton": triton.__version__, "sources": digests(), "kernels": rows}
        write_atomically(output / "gpu_kernels.json", json.dumps(kept, indent=1) + "\n")
        write_atomically(output / "gpu_kernels.md", page(rows))
    typer.echo(page(rows))
    if wrong:
        typer.echo(f"spill, do not fit, or are never launched: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
