"""`megalodon evaluate recall`: small models trained and measured on recall tasks, from a YAML config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recall(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="the study, such as configs/recall/mqar.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as training.epochs=4")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="the study's folder; runs/recall/ and the config's name")] = None,
    jobs: Annotated[int, typer.Option(help="runs side by side, one thread each")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the config and list the runs")] = False,
) -> None:
    """Train models on a recall task and table their accuracy. Ended at any instant, the same command goes on.

    The folder gets results.jsonl (a line a run), recall.md and recall.png. A trained model is scored with
    `megalodon evaluate passkey` and `megalodon evaluate induction`.
    """
    from megalodon.evaluation.recall import load_study, run_study, table

    if config.is_dir():
        raise ValueError(
            f"{config} is a folder: a study is a YAML file; score a model's folder with `megalodon evaluate passkey` "
            "or `megalodon evaluate induction`"
        )
    study = load_study(config, overrides or ())
    if dry_run:
        for cell in study.cells():
            typer.echo(str(cell))
        return
    folder = output or Path("runs") / "recall" / config.stem
    try:
        results = run_study(study, folder, jobs, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from the last epochs that were finished")
        raise SystemExit(130) from None
    typer.echo(table(study, results))
    typer.echo(f"written: {folder}/results.jsonl, {folder}/recall.md, {folder}/recall.png")
