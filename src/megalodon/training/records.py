"""All that a run writes down for people as it goes: metrics, TensorBoard, trackers, samples, the plot of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megalodon.training.config import TrainConfig
from megalodon.training.metrics import JsonLines, MetricsLog, last_step, plot_losses
from megalodon.training.run_folder import RunFolder
from megalodon.training.trackers import Trackers, TrackingSection


class Records:
    """The records of a run that goes on after `step`; what a folder holds of later steps is dropped.

    Args:
        tracking: where else the metrics go. settings: the run's config, in plain values, to be shown there.
    """

    def __init__(
        self,
        folder: RunFolder,
        step: int,
        tracking: TrackingSection | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._trackers = Trackers(
            tracking or TrackingSection(), folder.path, settings or {}, last_step(folder.metrics) if step >= 0 else -1
        )
        self._metrics = MetricsLog(folder.path, step)
        self._samples = JsonLines(folder.samples, step)

    def metrics(self, record: dict[str, Any]) -> None:
        """Write down the numbers of a step, which is among them."""
        self._metrics.write(record)
        self._trackers.log(record)

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
        self._trackers.close()


def records_of(config: TrainConfig, folder: RunFolder) -> Callable[[int], Records]:
    """Opens the records of a run, to go on after a step."""
    return lambda step: Records(folder, step, config.tracking, config.model_dump(mode="json"))
