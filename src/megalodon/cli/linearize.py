"""`megalodon linearize`: a pretrained Transformer into a model with constant memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def linearize(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="the folder of a Transformers model")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as transfer.tokens=1000000")
    ] = None,
    recipe: Annotated[str, typer.Option(help="how; docs/linearize.md says which when")] = "lolcats",
    config: Annotated[Path | None, typer.Option(help="a YAML file of keys; KEY=VALUE go over it")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="check everything, print the settings with nothing left open and the memory of the transfer, and stop",
        ),
    ] = False,
) -> None:
    """Keep a Transformer's weights and lose its cache. A run that was interrupted goes on where it was.

    SIGINT (Ctrl-C) and SIGTERM finish the step, save and stop with status 130 and 143. OUT is a model folder like any
    other: generate, evaluate, serve and train take it. The teacher's folder is only read.
    """
    import yaml

    from megalodon.linearize import linearize as run
    from megalodon.linearize import plan, read_config, recipe_of
    from megalodon.linearize.memory import predicted
    from megalodon.training import DivergedError

    chosen = recipe_of(recipe)
    settings = read_config(chosen.config, config, overrides or ())
    job = plan(teacher, out, chosen, settings)
    if dry_run:
        typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)
        for stage in predicted(job):
            typer.echo(f"# memory of {stage}")
        return
    try:
        stop = run(job)
    except DivergedError as error:
        print(f"megalodon: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if stop.signal is not None:
        typer.echo(f"stopped by {stop.signal.name} and saved; the same command goes on from there")
        raise SystemExit(128 + stop.signal)
    typer.echo(f"done: the model is in {out}; what each stage measured is in {out}/linearize")
