"""`megalodon compare`: architectures against each other, trained alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="what to compare, on what, how")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as train.run.steps=500")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the config and tell the sizes that match and the runs")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="write the report of what is finished, and do nothing else")
    ] = False,
) -> None:
    """Train architectures of one size on the same batches, each with its own best rate, and compare them.

    Everything lies in the config's folder: results.jsonl with a record a job, report.html, report.md, and jobs/ with
    every run. The same command goes on after an interruption, or when seeds or architectures were added.
    """
    from megalodon import comparison

    found = comparison.load_comparison(config, overrides or ())
    if dry_run:
        plan = comparison.Plan(found)
        for line in comparison.introduction(plan):
            typer.echo(line)
        for job in plan.wanted({}):
            typer.echo(f"{job}, {job.about['steps']:,} steps" if "steps" in job.about else str(job))
        typer.echo(f"then {len(found.seeds)} seeds of each architecture with the rate of its sweep")
        return
    if report_only:
        folder = Path(found.folder).expanduser()
        results = folder / "results.jsonl"
        if not results.is_file():
            raise FileNotFoundError(f"there are no results yet: {results}")
        comparison.write_report(comparison.Plan(found), comparison.read_results(results), folder)
    else:
        try:
            stop = comparison.compare(found, typer.echo)
        except comparison.JobError as error:
            print(f"megalodon: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if stop.signal is not None:
            typer.echo(f"stopped by {stop.signal.name}; the same command goes on from there")
            raise SystemExit(128 + stop.signal)
    typer.echo(f"written: {found.folder}/report.html, {found.folder}/report.md")
