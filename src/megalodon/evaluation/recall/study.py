"""All runs of a recall study: side by side, each result kept as it comes, none computed twice."""

from __future__ import annotations

import json
import multiprocessing
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import megalodon
from megalodon.evaluation.recall.config import Cell, RecallConfig
from megalodon.evaluation.recall.report import write_report
from megalodon.evaluation.recall.training import run_cell
from megalodon.files import write_text
from megalodon.training.progress import duration

Say = Callable[[str], None]


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result that the folder holds, by its fingerprint. The last line may be half written: it is passed over."""
    path, found = folder / "results.jsonl", {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[result["fingerprint"]] = result
    return found


def run_study(config: RecallConfig, folder: Path, jobs: int = 1, say: Say = print) -> list[dict[str, Any]]:
    """Run what the folder has no result of, and write `results.jsonl`, `recall.md` and `recall.png` after each run.

    Args:
        folder: made if there is none. A study that was ended at any instant goes on with the same call.
        jobs: runs side by side, each in a process with one thread; 1: in this process, with the threads that it has.
        say: told a line for every run that ends.

    Returns:
        The results of the config's runs, in the order of `config.cells()`.

    Raises:
        ValueError: jobs is below 1, or another process works in the folder.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "running").mkdir(exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            return _run(config, folder, jobs, say)
    except Timeout:
        raise ValueError(f"{folder}: another process works on this study") from None


def _run(config: RecallConfig, folder: Path, jobs: int, say: Say) -> list[dict[str, Any]]:
    kept = read_results(folder)
    cells = config.cells()
    prints = {cell: config.fingerprint(cell) for cell in cells}
    left = [cell for cell in cells if prints[cell] not in kept]
    if len(left) < len(cells):
        say(f"{len(cells) - len(left)} of {len(cells)} runs are there already")
    begun = time.perf_counter()
    for number, (cell, result) in enumerate(_results(config, left, folder / "running", jobs), 1):
        kept[result["fingerprint"]] = {**result, "made_with": versions()}
        lines = (json.dumps(each) for each in kept.values())
        write_text(folder / "results.jsonl", "".join(f"{line}\n" for line in lines))
        write_report(config, _of(config, kept), folder)
        more = (time.perf_counter() - begun) / number * (len(left) - number)
        outcome = "diverged" if result["diverged"] else f"{result['mean_accuracy']:.1%}"
        say(
            f"{cell}: {outcome} after {result['epochs']} epochs, {duration(result['seconds'])}; {len(left) - number} "
            f"runs and about {duration(more)} left"
        )
    write_report(config, _of(config, kept), folder)
    return _of(config, kept)


def _of(config: RecallConfig, kept: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    prints = [config.fingerprint(cell) for cell in config.cells()]
    return [kept[fingerprint] for fingerprint in prints if fingerprint in kept]


def _results(config: RecallConfig, cells: list[Cell], folder: Path, jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if jobs == 1:
        for cell in cells:
            yield cell, run_cell(config, cell, folder)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, max(len(cells), 1)), context, initializer=_start)
    running = {pool.submit(run_cell, config, cell, folder): cell for cell in cells}
    try:
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers if running else ():
            worker.terminate()


def _start() -> None:
    """One thread a run; Ctrl-C is the first process's to answer, which ends the others. Results are kept an epoch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def versions() -> dict[str, str]:
    """What a result was made with."""
    return {
        "megalodon": megalodon.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "machine": platform.machine(),
    }
