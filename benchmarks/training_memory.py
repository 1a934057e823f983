"""Memory that a training step adds, by build: what `cpu_peers.py` counts, for this build beside an earlier one.

Each case runs in a process of its own: the model of `cpu_builds.py`, one whole step (forward, backward, AdamW), and the
rise of resident memory over what stood before it. `checkpoint-65536` is a step of 65,536 tokens with activation
checkpointing.

    python benchmarks/training_memory.py --before ../before/src --output training_memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _machine import describe_machine
from _measure import gigabytes, peak_memory, settle_memory
from _report import RESULTS, document, new_run, save
from cpu_builds import make_model, training

CASES = ("step-512", "step-2048", "step-8192", "checkpoint-65536")


def work(case: str) -> None:
    """Print the bytes that a case adds."""
    kind, length = case.split("-")
    model = make_model("16m", "float32")
    if kind == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    training(model, 1, 64, False, optimizer)()  # loads kernels, and makes what the optimiser keeps
    settle_memory()
    with peak_memory() as added:
        training(model, 1, int(length), False, optimizer)()
    print(json.dumps(added[0]))


def measure(source: Path, case: str) -> int:
    """Bytes that a case adds in a build."""
    path = os.pathsep.join([str(source.resolve()), str(Path(__file__).parent)])
    command = [sys.executable, __file__, "--work", case]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def main(
    before: Annotated[Path | None, typer.Option(help="the `src` folder of the build to compare with")] = None,
    case: Annotated[list[str], typer.Option(help="which; all by default")] = list(CASES),  # noqa: B006
    output: Annotated[str, typer.Option(help="name of the files in results/; empty for none")] = "",
) -> None:
    """Measure, and write after every case."""
    here = Path(__file__).parents[1] / "src"
    builds = {"before": before, "now": here} if before else {"now": here}
    result = new_run("training_memory", describe_machine(512), {"cases": case}) | {"bytes": {}}
    lines = [f"| case | {' | '.join(builds)} | now / before |", "| --- |" + " --: |" * (len(builds) + 1)]
    for one in case:
        found: dict[str, Any] = {name: measure(source, one) for name, source in builds.items()}
        result["bytes"][one] = found
        ratio = f"{found['now'] / found['before']:.2f}" if before else ""
        lines.append(f"| {one} | {' | '.join(map(gigabytes, found.values()))} | {ratio} |")
        print(lines[-1], flush=True)
        if output:
            save(
                result, document("Memory that a training step adds", result, ["\n".join(lines)], False), RESULTS, output
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    work(sys.argv[2]) if "--work" in sys.argv else typer.run(main)
