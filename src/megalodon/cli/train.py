"""`megalodon train`: a model from a YAML config, from the start or from where the run's folder stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="what to train, on what, how")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optimizer.learning_rate=3e-4")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the config, print it with nothing left open, and the model's size")
    ] = False,
) -> None:
    """Train a model. A run that was interrupted goes on exactly where its last checkpoint stands.

    SIGINT (Ctrl-C) and SIGTERM finish the step, save and stop with status 130 and 143. A loss that is not finite stops
    with status 1. Everything of a run lies in its folder: config.yaml, metrics.jsonl, loss.png, tensorboard/,
    samples.jsonl, checkpoints/ and, at the end, model/.

    Under torchrun, all its processes train one model, cut as the config's `mesh` says.
    """
    from megalodon import training

    resolved = training.resolve(training.load_config(config, overrides or ()), config.stem)
    folder = resolved.config.run.folder
    if dry_run:
        typer.echo(training.config_text(resolved.config), nl=False)
        typer.echo(f"# {training.count_parameters(resolved.model_config):,} parameters", err=True)
        return
    try:
        stop = training.train(resolved)
    except training.DivergedError as error:
        if training.is_first_rank():
            print(f"megalodon: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except training.UnresponsiveError as error:
        print(f"megalodon: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("megalodon: stopped before the first step; there was nothing to save", file=sys.stderr)
        raise SystemExit(130) from None
    if stop.signal is not None:
        if training.is_first_rank():
            typer.echo(f"stopped by {stop.signal.name} and saved; the same command goes on from there")
        raise SystemExit(128 + stop.signal)
    if training.is_first_rank():
        typer.echo(f"done: the model is in {folder}/model, the metrics in {folder}/metrics.jsonl and {folder}/loss.png")
