"""Compiles every Triton kernel ahead of time for sm_80 and sm_90 and reports registers, spills and shared memory.

Needs Triton, no GPU. Writes `results/gpu_kernels.json` and `.md`; exit status 1 if a kernel spills in a configuration
that the library launches.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
import typer
from _report import RESULTS, markdown_table, write_atomically
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
VARIANTS = ((False, False), (True, False), (False, True))
"""Of attention: with a cache, with dropout."""

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}


@dataclass
class Launch:
    """One configuration of one kernel, as the library launches it."""

    label: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    scalars: dict[str, str] = field(default_factory=dict)
    capabilities: tuple[int, ...] = tuple(ARCHITECTURES)

    def source(self) -> ASTSource:
        types = dict.fromkeys(self.kernel.arg_names, "i32")
        types |= {name: "*" + dtype for name, dtype in self.pointers.items()} | self.scalars
        types |= dict.fromkeys(self.constants, "constexpr")
        unknown = types.keys() - set(self.kernel.arg_names)
        assert not unknown, f"{self.label}: no such arguments: {unknown}"
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(self.kernel.arg_names)
            if name in self.pointers or (name in ("D", "DN", "N", "E", "width") and name not in self.constants)
        }
        ordered = {name: types[name] for name in self.kernel.arg_names}
        return ASTSource(self.kernel, ordered, dict(self.constants), aligned)


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Resources of one kernel on one architecture, as ptxas reports them."""
    binary = triton.compile(
        launch.source(),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(binary.asm["ptx"])
        run = subprocess.run(
            [
                triton.knobs.nvidia.ptxas.path,
                "-v",
                f"--gpu-name={ARCHITECTURES[capability]}",
                str(ptx),
                "-o",
                os.devnull,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    return {
        "architecture": ARCHITECTURES[capability],
        "registers": _number(r"Used (\d+) registers", run.stderr),
        "spill_stores": _number(r"(\d+) bytes spill stores", run.stderr),
        "spill_loads": _number(r"(\d+) bytes spill loads", run.stderr),
        "shared": binary.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", binary.asm["ptx"])),
        "asynchronous_copies": len(re.findall(r"\bcp\.async\.c[ag]|cp\.async\.bulk", binary.asm["ptx"])),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas reported nothing like {pattern!r}:\n{text}")
    return int(found.group(1))


def launches() -> list[Launch]:
    """Every kernel in the configurations of the presets: bfloat16 and float32, D = 4096, N = 16, G = 64, H = 4."""
    return [*_cema(), *_timestep_norm(), *_chunk_attention(), *_strips()]


def rehearsed(every: list[Launch]) -> list[Launch]:
    """The last kernel of each operator, which is a small one."""
    return list({launch.label.split()[0]: launch for launch in every}.values())


def _cema() -> list[Launch]:
    from megalodon.ops.cema import triton as ours
    from megalodon.ops.cema import triton_kernels as kernels

    tables = {"runs": "i32", "order": "i32"}
    wide = dict.fromkeys(("p", "q", "gamma", "omega", "taps", "local", "initial", "entering", "last", "ends"), "fp32")
    wide |= dict.fromkeys(("leaving", "d_last", "d_initial", "partial", "sums", "correlation"), "fp32")
    wide |= dict.fromkeys(("d_p", "d_q", "d_gamma", "d_omega"), "fp32")
    found = []

    def add(label: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int = 4) -> None:
        pointers = {**wide, **tables, "rows": "i32", "x": dtype, "dy": dtype, "y": dtype}
        pointers = {name: pointers[name] for name in kernel.arg_names if name in pointers}
        found.append(Launch(f"cema {label}", kernel, pointers, constants, warps, 3 if "correlate" in label else 2))

    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        size = ours.channels(16, itemsize)
        sizes = {"DC": size, "M": ours.GROUP, "T": ours.BLOCK, "NP": 16, "BITS": 4}
        add(f"states {dtype}", kernels.states_kernel, dtype, {**sizes, "REVERSE": False}, ours.WARPS)
        add(f"outputs {dtype}", kernels.outputs_kernel, dtype, {**sizes, "REVERSE": False}, ours.WARPS)
        add(f"outputs reversed {dtype}", kernels.outputs_kernel, dtype, {**sizes, "REVERSE": True}, ours.WARPS)
        add(f"correlate {dtype}", kernels.correlate_kernel, dtype, {**sizes, **ours.CORRELATE_TILE}, 8)
        add(f"step {dtype}", kernels.step_kernel, dtype, {"HAS_OMEGA": True, "HAS_INITIAL": True, "DC": 32, "NP": 16})
    flags = {"LENGTH_BITS": 16, "BLOCK": 256}
    add("taps", kernels.taps_kernel, "bf16", {"HAS_OMEGA": True, "DC": 4, "T": ours.BLOCK, "NP": 16, "BITS": 4})
    add("scan", kernels.scan_kernel, "bf16", {**flags, "HAS_INITIAL": True})
    add("adjoint scan", kernels.adjoint_scan_kernel, "bf16", {**flags, "HAS_LAST": True, "T": ours.BLOCK})
    add("gradients", kernels.gradients_kernel, "bf16", {"T": ours.BLOCK, "NP": 16}, 1)
    return found


def _timestep_norm() -> list[Launch]:
    from megalodon.ops.timestep_norm import triton as ours
    from megalodon.ops.timestep_norm import triton_kernels as kernels

    pointers = dict.fromkeys(("means", "scales", "d_weight", "d_bias"), "fp32")
    pointers |= dict.fromkeys(("entering", "summary", "counts", "last", "flowing", "d_mean", "d_var"), "fp64")
    pointers |= dict.fromkeys(("mean", "var", "prior_mean", "prior_var"), "fp64")
    pointers |= {"runs": "i32", "rows": "i32", "count": "i64", "padding": "i1", "weight": "fp32", "bias": "fp32"}
    found = []

    def add(label: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int = ours.WARPS) -> None:
        known = {**pointers, "x": dtype, "y": dtype, "dx": dtype, "dy": dtype}
        known = {name: known[name] for name in kernel.arg_names if name in known}
        scalars = {"eps": "fp32"} if "eps" in kernel.arg_names else {}
        found.append(Launch(f"timestep_norm {label}", kernel, known, constants, warps, 3, scalars))

    for dtype in ("bf16", "fp32"):
        for groups in (64, 4096):
            sizes, with_affine = ours.tile(4096, groups), {"HAS_WEIGHT": True, "HAS_PADDING": False}
            sizes |= {"G": groups, "F": 4096 // groups}
            name = f"{dtype} G={groups}"
            add(f"summary {name}", kernels.summary_kernel, dtype, {"HAS_PADDING": False, **sizes})
            add(f"forward {name}", kernels.norm_kernel, dtype, {"HAS_BIAS": True, **with_affine, **sizes})
            sizes |= ours.tile(4096, groups, ours.TILE // 2)
            for write in (True, False):
                add(
                    f"backward{'' if write else ' summary'} {name}", kernels.backward_kernel, dtype,
                    {"WRITE": write, **with_affine, **sizes}, ours.BACKWARD_WARPS,
                )  # fmt: skip
    add("scan", kernels.scan_kernel, "bf16", {"BLOCK": 64}, 2)
    add("adjoint scan", kernels.adjoint_scan_kernel, "bf16", {"HAS_LAST": True, "BLOCK": 64}, 2)
    return found


def _chunk_attention() -> list[Launch]:
    from megalodon.ops.chunk_attention import triton as ours
    from megalodon.ops.chunk_attention import triton_kernels as kernels

    floats = dict.fromkeys(("lse", "delta", "partial", "peaks"), "fp32")
    integers = {"seed": "i64", "spans": "i32", "work": "i32", "places": "i64"}
    activations = ("q", "k", "v", "cache_k", "cache_v", "out", "d_out", "dq", "dk_out", "dv_out", "d_cache")
    names = {
        "forward": kernels.forward_kernel,
        "queries": kernels.query_gradients_kernel,
        "keys": kernels.key_gradients_kernel,
        "values": kernels.value_gradients_kernel,
    }
    found = []

    def add(
        label: str,
        kernel: Any,
        dtype: str,
        constants: dict[str, Any],
        warps: int,
        stages: int,
        targets: tuple[int, ...],
    ) -> None:
        known = {**floats, **integers, **dict.fromkeys(activations, dtype)}
        known = {name: known[name] for name in kernel.arg_names if name in known}
        scalars = {"dropout": "fp32"} if "dropout" in kernel.arg_names else {}
        found.append(Launch(f"chunk_attention {label}", kernel, known, constants, warps, stages, scalars, targets))

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        variants = [(capability, cached, dropout) for capability in ARCHITECTURES for cached, dropout in VARIANTS]
        for capability, cached, dropout in variants:
            block = ours.block_size(dtype, capability >= 90, dropout)
            suffix = " with a cache" if cached else " with dropout" if dropout else ""
            for kernel, tile in ours.tiles(block, ours.WIDEST_KEY[dtype], 2048, cached).items():
                flags = {"HAS_CACHE": cached, "DROPOUT": dropout, "DROPKEY": False, "FULL_K": True, "FULL_V": True}
                sizes = {k: v for k, v in tile.items() if k[:4] != "num_"}
                add(
                    f"{kernel} {name}{suffix}", names[kernel], name, {**flags, **sizes},
                    tile["num_warps"], tile["num_stages"], (capability,),
                )  # fmt: skip
        both = tuple(ARCHITECTURES)
        sizes = {"PER_ROW": True, "SPLIT": ours.SPLIT, "BN": 16, "DK": 256, "DV": 2048}
        add(f"decode {name}", kernels.decode_kernel, name, sizes, 8, 3, both)
        add(f"join {name}", kernels.join_kernel, name, {"BS": 64, "DV": 512}, 4, 3, both)
        add(f"delta {name}", kernels.delta_kernel, name, {"BM": 8, "DV": 256}, 4, 3, both)
    return found


def _strips() -> list[Launch]:
    from megalodon.ops.chunk_attention import strip_kernels as kernels
    from megalodon.ops.chunk_attention import strips as ours

    found = []

    def add(label: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> None:
        known = {"seed": "i64", "lse": "fp32", "delta": "fp32", "d_weights": "fp32"}
        known |= dict.fromkeys(("q", "k", "weights", "d_scores"), dtype)
        known = {name: known[name] for name in kernel.arg_names if name in known}
        found.append(Launch(f"strips {label}", kernel, known, constants, warps, stages, {"dropout": "fp32"}))

    for name, dtype, key in (("bf16", torch.bfloat16, 256), ("fp32", torch.float32, 128)):
        tile = ours.tile(dtype, key)
        sizes = {k: v for k, v in tile.items() if k[:4] != "num_"} | {"FULL": True, "DROPKEY": False}
        launch = tile["num_warps"], tile["num_stages"]
        add(f"normaliser {name}", kernels.normaliser_kernel, name, sizes, *launch)
        for gradient in (False, True):
            for dropout in (False, True):
                label = f"{'gradients' if gradient else 'weights'} {name}{' with dropout' if dropout else ''}"
                add(label, kernels.weights_kernel, name, {**sizes, "GRADIENT": gradient, "DROPOUT": dropout}, *launch)
    return found


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
    only: Annotated[str, typer.Option(help="Kernels whose label contains this; nothing is written.")] = "",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="One kernel of each operator: shows that the script works.")
    ] = False,
) -> None:
    """Compiles, prints the table, writes JSON and Markdown."""
    results = []
    for launch in rehearsed(launches()) if rehearse else launches():
        if only not in launch.label:
            continue
        for capability in launch.capabilities:
            found = compiled(launch, capability)
            limits = {"warps": launch.warps, "fits": found["shared"] <= SHARED_LIMITS[capability]}
            results.append({"kernel": launch.label, **found, **limits})
            typer.echo(f"{launch.label}, {ARCHITECTURES[capability]}: {found['registers']} registers", err=True)
    header = [
        "kernel ",
        "for ",
        "warps",
        "registers",
        "spilled bytes",
        "shared KiB",
        "tensor-core instr.",
        "async copies",
    ]
    lines = [
        [
            *(r["kernel"], r["architecture"], str(r["warps"]), str(r["registers"])),
            str(r["spill_stores"] + r["spill_loads"]),
            f"{r['shared'] / 1024:.1f}",
            *(str(r["tensor_core_instructions"]), str(r["asynchronous_copies"])),
        ]
        for r in results
    ]
    page = "\n".join(
        [
            "# Resources of the GPU kernels",
            "",
            f"`python benchmarks/gpu/compile_kernels.py`, Triton {triton.__version__}: compiled, not run.",
            "Registers are per thread; instructions are counted in the PTX.",
            "",
            markdown_table(header, lines),
            "",
        ]
    )
    if not (only or rehearse):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(
            output / "gpu_kernels.json", json.dumps({"triton": triton.__version__, "kernels": results}, indent=1) + "\n"
        )
        write_atomically(output / "gpu_kernels.md", page)
    typer.echo(page)
    if any(r["spill_stores"] or not r["fits"] for r in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
