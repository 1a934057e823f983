"""`megalodon plan`: which mesh for a model on so many devices, and what each costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="a published size, such as paper-7b, or a model folder")],
    devices: Annotated[int, typer.Option(min=1, help="accelerators in all")],
    context: Annotated[int, typer.Option(min=1, help="tokens in a row of a step")],
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="rows in a step, over all devices; if not given, about 4M tokens that they divide"),
    ] = None,
    hardware: Annotated[str, typer.Option(help="a100, h100 or h200")] = "h100",
    precision: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    streamed: Annotated[bool, typer.Option("--streamed", help="rows carry their memory from step to step")] = False,
    top: Annotated[int, typer.Option(min=1, help="how many meshes to show")] = 8,
) -> None:
    """Memory, traffic and step time of every mesh that can work, and the `mesh` section of the best.

    Nothing is run on the devices: memory follows from the code's own tensors, times from peak rates and assumptions
    that are printed with them. Take times for an order of the meshes, not for a promise.
    """
    from megalodon.models import all_presets, load_config
    from megalodon.parallel.hardware import HARDWARE
    from megalodon.parallel.planning import Job, default_rows, plans
    from megalodon.parallel.report import report

    if hardware not in HARDWARE:
        raise ValueError(f"--hardware: {hardware!r} is not known; there are {', '.join(HARDWARE)}")
    if precision not in ("bfloat16", "float32"):
        raise ValueError(f"--precision: {precision!r}; choose bfloat16 or float32")
    presets = all_presets()
    if model in presets:
        config = presets[model].from_preset(model)
    elif (Path(model) / "config.json").is_file():
        config = load_config(model)
    else:
        raise ValueError(f"--model: {model!r} is neither a folder nor one of {', '.join(presets)}")
    job = Job(config, devices, context, batch_size or default_rows(devices, context), precision, streamed)
    typer.echo(report(job, HARDWARE[hardware], plans(job, HARDWARE[hardware]), top))
