"""All GPU tests and benchmarks in order of worth, in a given number of minutes.

    python benchmarks/gpu/everything.py --minutes 9
    python benchmarks/gpu/everything.py --only decode --only peers --port FOLDER

Each runs in a process group of its own with its own limit, and is ended at that limit or when the minutes are over;
what it measured until then is in its files, and what it printed in `gpu_everything.log`. Exit status 1 if a test or a
check failed, or a row broke; being cut off is no failure.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from _report import RESULTS, markdown_table, write_atomically

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
LOG = "gpu_everything.log"
GRACE = 5.0
"""Seconds kept back from the budget, for ending the last child and writing the table."""


@dataclass
class Step:
    """One child.

    Attributes:
        limit: seconds that it gets at most.
        arguments: of Python, without those that all scripts share.
        script: whether it is one of this folder's, which take `--output` and `--rehearse`.
    """

    name: str
    limit: float
    arguments: list[str]
    script: bool = True
    outcome: str = "not begun"
    seconds: float = 0.0
    options: list[str] = field(default_factory=list)

    def command(self, output: Path, rehearse: bool) -> list[str]:
        """To run it."""
        own = [str(FOLDER / self.arguments[0]), *self.arguments[1:]] if self.script else self.arguments
        shared = ["--output", str(output), *(["--rehearse"] if rehearse else [])] if self.script else []
        return [sys.executable, *own, *self.options, *shared]


def steps(rehearse: bool, peers: list[str]) -> list[Step]:
    """What runs, in order of worth; `peers`: options of peers.py. A rehearsal collects the tests and runs none."""
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not rehearse else []
    tests = [f"tests/{name}" for name in ("ops", "model", "inference")]
    # A package that only other tests need must not keep the kernels' from running.
    options = ["-m", "gpu and not slow", "--continue-on-collection-errors", *workers]
    collected = ["--collect-only"] if rehearse else []
    return [
        Step("tests", 150, ["-m", "pytest", *tests, *options, *collected], script=False),
        Step("operators", 180, ["operators.py"]),
        Step("layer", 120, ["models.py", "--section", "layer"]),
        Step("decode", 200, ["models.py", "--section", "decode", "--read-seconds", "110"]),
        Step("training", 60, ["models.py", "--section", "training"]),
        Step("small", 60, ["models.py", "--section", "small"]),
        Step("peers", 60, ["peers.py"], options=peers),
        Step("parallel", 45, ["parallel_throughput.py", "--no-plan"]),
    ]


def run(step: Step, seconds: float, output: Path, rehearse: bool) -> None:
    """Runs it for so many seconds at most, then ends it and all that it started."""
    command = step.command(output, rehearse)
    begin = perf_counter()
    with (output / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n==== {step.name}: {' '.join(command)}\n")
        log.flush()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = child.wait(seconds)
            step.outcome = "passed" if status == 0 else f"failed (status {status})"
        except subprocess.TimeoutExpired:
            step.outcome = f"cut off at {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of the group: workers, compilers
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    step.seconds = perf_counter() - begin


@contextlib.contextmanager
def folder_for(output: Path | None, rehearse: bool) -> Iterator[Path]:
    """Where results go: a rehearsal keeps them only where a folder is named."""
    if output is None and rehearse:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    chosen = (output or RESULTS).resolve()
    chosen.mkdir(parents=True, exist_ok=True)
    yield chosen


def summary(chosen: list[Step]) -> str:
    """A Markdown table."""
    rows = [[step.name, step.outcome, f"{step.seconds:.0f}"] for step in chosen]
    return markdown_table(["step ", "outcome ", "seconds"], rows)


def main(
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Tiny sizes on a CPU, no budget for each step.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results and log. [default: benchmarks/results; none in a rehearsal]")
    ] = None,
    minutes: Annotated[float, typer.Option(help="For everything together.")] = 9,
    only: Annotated[list[str] | None, typer.Option(help="Steps to run; can be repeated. All by default.")] = None,
    port: Annotated[Path | None, typer.Option(help="For peers.py: a checkout of pszemraj/megalodon-hf.")] = None,
    authors: Annotated[Path | None, typer.Option(help="For peers.py: a checkout of XuezheMax/megalodon.")] = None,
) -> None:
    """Runs the steps and ends with a table of what passed, failed or was cut off."""
    if not (rehearse or torch.cuda.is_available()):
        typer.echo("these benchmarks need a CUDA device: none is available (--rehearse does without)", err=True)
        raise typer.Exit(2)
    end = perf_counter() + 60 * minutes - GRACE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child does not outlive this process
    folders = {"--port": port, "--authors": authors}
    peers = [text for option, path in folders.items() if path for text in (option, str(path.resolve()))]
    every = steps(rehearse, peers)
    if unknown := set(only or []) - {step.name for step in every}:
        known = ", ".join(step.name for step in every)
        raise typer.BadParameter(f"--only {', '.join(sorted(unknown))}: choose from {known}")
    chosen = [step for step in every if not only or step.name in only]
    with folder_for(output, rehearse) as folder:
        (folder / LOG).unlink(missing_ok=True)
        for step in chosen:
            left = end - perf_counter()
            if left < GRACE:
                break
            typer.echo(f"{step.name}: {left:.0f} s are left", err=True)
            run(step, left if rehearse else min(step.limit, left), folder, rehearse)
            typer.echo(f"{step.name}: {step.outcome}, {step.seconds:.0f} s", err=True)
            if step.outcome.startswith("failed"):
                typer.echo("\n".join((folder / LOG).read_text(encoding="utf-8").splitlines()[-15:]), err=True)
            write_atomically(folder / "gpu_everything.md", f"# What ran on the GPU\n\n{summary(chosen)}\n")
        typer.echo(summary(chosen))
    if any(step.outcome.startswith("failed") for step in chosen):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
