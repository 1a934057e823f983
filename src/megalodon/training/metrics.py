"""What a run records step by step: JSON lines that survive a kill and a resume, TensorBoard events, the loss's plot."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from megalodon.files import write_file, write_text


class JsonLines:
    """A file of JSON objects, one a line, each with the `step` it belongs to.

    Opening drops the lines past `step` (all of them for -1), and a line that a kill cut short, so that a resumed run
    writes each step once.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [record for record in read_lines(path) if record["step"] <= step] if path.exists() else []
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path = path
        # Unbuffered, so that closing has nothing left to write when the disk is full.
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is in the file, if not yet on the disk, when this returns.

        Raises:
            OSError: naming the file, if the disk is full or refuses; resuming removes what may be half a line.
            ValueError: for a number that is not finite, which is no JSON.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def sync(self) -> None:
        """Return once all the records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, up to the first line that a kill cut short."""
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for line in whole_lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def last_step(path: Path) -> int:
    """The last step that a JSON-lines file has a record of; -1 where there is none."""
    return max((record["step"] for record in read_lines(path)), default=-1) if path.exists() else -1


class MetricsLog:
    """`metrics.jsonl` and TensorBoard's events in the run's folder: the same numbers, step by step."""

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here: it takes a second, and only a run that trains needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self._lines = JsonLines(self.path, step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Record the numbers of one step."""
        self._lines.write(record)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Return once all is on the disk."""
        self._lines.sync()
        self._board.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average without start-up bias; `weight` in [0, 1) is kept of the past."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def plot_losses(metrics: Path, target: Path) -> None:
    """Draw the training loss, plain and smoothed, and the held-out loss over the steps, in nats per token, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_lines(metrics)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    heldout = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(list(losses), 0.95), color="tab:blue", label="training, smoothed")
    if heldout:
        steps, losses = zip(*heldout, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or heldout:
        axes.legend()
    write_file(target, lambda path: figure.savefig(path, format="png", dpi=120))
    pyplot.close(figure)
