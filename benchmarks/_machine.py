"""What the benchmarks ran on: processor, cores, versions, and what its matrix products really reach."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

import megalodon

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16")  # names in /proc/cpuinfo


def describe_machine(gemm_size: int = 2048) -> dict[str, Any]:
    """Facts a reader needs to judge a number; GEMM rates are measured now, on a square product of `gemm_size`."""
    return {
        "cpu": cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_memory(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "megalodon": megalodon.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": bf16_instructions(),
        "gemm_size": gemm_size,
        "gemm_gflops_float32": gemm_gflops(torch.float32, gemm_size),
        "gemm_gflops_bf16": gemm_gflops(torch.bfloat16, gemm_size),
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def gemm_gflops(dtype: torch.dtype, size: int, seconds: float = 1.0) -> float:
    """The best rate of one [size, size] product, in 1e9 floating-point operations per second, over about `seconds`."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, deadline = float("inf"), perf_counter() + seconds
    torch.mm(a, b)
    while best == float("inf") or perf_counter() < deadline:
        start = perf_counter()
        torch.mm(a, b)
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best / 1e9


def cpu_name() -> str:
    """The processor's model name, as far as the system tells."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def bf16_instructions() -> list[str] | None:
    """The bfloat16 instruction sets the processor announces; empty: none, so bf16 is emulated; None: cannot be told."""
    flags = _cpuinfo("flags") or _cpuinfo("Features")
    return None if flags is None else [name for name in BF16_INSTRUCTIONS if name in flags.split()]


def total_memory() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine_slug(machine: dict[str, Any]) -> str:
    """A short name for files: `amd-epyc-7763-2-threads`."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['threads']} threads".lower()).strip("-")


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The machine in Markdown, for the head of a table."""
    bf16 = machine["bf16_instructions"]
    instructions = "unknown" if bf16 is None else ", ".join(bf16) or "none (bf16 is emulated)"
    memory = machine["memory_bytes"]
    load = machine["load_average_at_start"]
    return [
        f"- {machine['cpu']}, {machine['logical_cores']} logical cores, {machine['threads']} threads used"
        + (f", {memory / 2**30:.0f} GiB" if memory else ""),
        f"- {machine['system']}, torch {machine['torch']} ({machine['torch_cpu_capability']}), "
        f"Transformers {machine['transformers']}, megalodon {machine['megalodon']}, Python {machine['python']}",
        f"- matrix products of {machine['gemm_size']}: {machine['gemm_gflops_float32']:.0f} GFLOP/s in float32, "
        f"{machine['gemm_gflops_bf16']:.0f} in bf16; bf16 instructions: {instructions}",
        f"- load average before the run: {'unknown' if load is None else f'{load:.2f}'}",
    ]


def _cpuinfo(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    match = re.search(rf"^{re.escape(field)}\s*:\s*(.+)$", path.read_text(), flags=re.MULTILINE)
    return match.group(1).strip() if match else None
