"""All that a run writes down for people as it goes: metrics, TensorBoard, samples, the plot of the losses."""

from __future__ import annotations

from typing import Any

from megalodon.training.metrics import JsonLines, MetricsLog, plot_losses
from megalodon.training.run_folder import RunFolder


class Records:
    """The records of a run that goes on after `step`; what a folder holds of later steps is dropped."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        self._metrics = MetricsLog(folder.path, step)
        self._samples = JsonLines(folder.samples, step)

    def metrics(self, record: dict[str, Any]) -> None:
        """Write down the numbers of a step, which is among them."""
        self._metrics.write(record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write down a continuation of a prompt."""
        self._samples.write({"step": step, "prompt": prompt, "text": text})

    def sync(self) -> None:
        """Return once everything is on the disk."""
        self._metrics.sync()
        self._samples.sync()

    def plot(self) -> None:
        """Draw the losses anew."""
        plot_losses(self._folder.metrics, self._folder.plot)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
