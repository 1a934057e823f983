"""`megalodon info`: versions, hardware and back ends in use, what a bug report needs; or what a model's state takes."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

import megalodon

WIDTH = 36
"""Columns of the names."""

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="a model folder, or a published size by name: tells what a state of it takes")
    ] = None,
) -> None:
    """Show versions, hardware and the back ends in use; of a model, its parameters and the bytes of its state."""
    for name, value in facts() if model is None else model_facts(model):
        print(f"{name:<{WIDTH}} {value}")


def model_facts(model: str) -> list[tuple[str, str]]:
    """What is shown of a model, in order.

    Raises:
        ValueError: there is no such folder or size.
    """
    import torch

    from megalodon.models import all_presets, architecture, build_model, load_config

    presets = all_presets()
    if model in presets:
        config = presets[model].from_preset(model)
    elif (Path(model) / "config.json").is_file():
        config = load_config(model)
    else:
        raise ValueError(f"{model!r} is neither a model folder nor one of {', '.join(presets)}")
    kind = architecture(config.model_type)
    with torch.device("meta"):
        parameters = build_model(config).num_parameters()
    rows = [("architecture", config.model_type), ("parameters", f"{parameters:,}")]
    state, chunk = kind.model.state_class, getattr(config, "chunk_size", None)
    if chunk is None:
        return rows
    sizes = state.dimensions_class.of(config)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        least, most = (state.row_bytes(sizes, tokens, dtype) for tokens in (0, chunk - 1))
        rows.append((f"state, {name}", f"{least:,} bytes where a chunk ends, at most {most:,}; for any length of text"))
    return rows


def facts() -> list[tuple[str, str]]:
    """What is shown, in order."""
    import torch

    from megalodon import ops
    from megalodon.inference import choose_device
    from megalodon.ops.backend import TRITON_VERSION, cpu_multiplies_bfloat16, without_kernels

    device = choose_device()
    rows = [
        ("megalodon", megalodon.__version__),
        ("torch", torch.__version__),
        ("transformers", version("transformers")),
        ("tokenizers", version("tokenizers")),
        ("Python", platform.python_version()),
        ("platform", platform.platform()),
        ("CPU", f"{cpu_name()}, {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads"),
        ("CPU vector extensions", torch.backends.cpu.get_cpu_capability()),
        ("CPU bfloat16 products", "in hardware" if cpu_multiplies_bfloat16() else "none: computed in float32"),
        *((f"GPU {index}", gpu_name(index)) for index in range(torch.cuda.device_count())),
        ("default device", str(device)),
    ]
    for operator, (chosen, available) in ops.backends(device).items():
        rows.append((f"back end, {operator}", f"{chosen} (of {', '.join(available)})"))
    reason = without_kernels(device.type, device.index)
    rows.append(("Triton kernels", f"not here: {reason}" if reason else f"Triton {TRITON_VERSION}"))
    forced = os.environ.get(ops.ENVIRONMENT_VARIABLE)
    rows.append((ops.ENVIRONMENT_VARIABLE, f"{forced}, for every operator" if forced else "not set"))
    return rows


def cpu_name() -> str:
    """The processor's name, from Linux's own list where there is one."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def gpu_name(index: int) -> str:
    """Name, memory and compute capability of a GPU."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.1f} GiB, compute capability {properties.major}.{properties.minor}"
