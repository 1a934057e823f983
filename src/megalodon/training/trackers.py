"""Experiment trackers beside TensorBoard: Weights & Biases and MLflow, each through its own library, if asked for.

A tracker gets the numbers of metrics.jsonl, step by step. A resumed run goes on in the tracker's same run, whose name
is kept in the run's folder, and sends no step twice. A tracker that fails never ends a training: it is said once, and
the numbers are in metrics.jsonl in any case.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from pydantic import Field

from megalodon.files import write_text
from megalodon.training.section import Section, changeable

NAMES = "trackers.json"
"""In the run's folder: how each tracker calls the run."""

logger = logging.getLogger("megalodon.training")


class WandbSection(Section):
    """Weights & Biases."""

    project: str = Field(min_length=1)
    entity: str | None = Field(default=None, description="a user or team; null: the user's own")
    name: str | None = Field(default=None, description="of the run; null: that of its folder")
    mode: Literal["online", "offline"] = Field(default="online", description="offline: into the folder, to sync later")


class MlflowSection(Section):
    """MLflow."""

    experiment: str = Field(min_length=1)
    uri: str | None = Field(default=None, description="of the tracking server, or a folder; null: MLFLOW_TRACKING_URI")
    name: str | None = Field(default=None, description="of the run; null: that of its folder")


class TrackingSection(Section):
    """Where else the metrics go."""

    wandb: WandbSection | None = changeable(None, description="Weights & Biases: project, entity, name, mode")
    mlflow: MlflowSection | None = changeable(None, description="MLflow: experiment, uri, name")


def require_libraries(tracking: TrackingSection) -> None:
    """Raise ValueError, before any work, for a tracker whose library is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(tracking, name) is not None:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ValueError(
                    f"tracking.{name}: needs the library {name} ({error}): pip install 'megalodon-lm[trackers]'"
                ) from None


class Tracker(Protocol):
    """One tracker's run."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step."""

    def close(self) -> None:
        """Return once everything is sent."""


class WandbTracker:
    """A run of Weights & Biases. Its files lie in the run's folder, under wandb/."""

    def __init__(self, section: WandbSection, folder: Path, known: str | None, settings: dict[str, Any]) -> None:
        import wandb

        self.name = known or uuid4().hex[:12]
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or folder.name,
            id=self.name,
            resume="allow",
            dir=str(folder),
            mode=section.mode,
            config=settings,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow."""

    def __init__(self, section: MlflowSection, folder: Path, known: str | None, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=section.uri)
        if known is not None:
            self.name = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(section.experiment)
        identity = (
            self._client.create_experiment(section.experiment) if experiment is None else experiment.experiment_id
        )
        self.name = self._client.create_run(identity, run_name=section.name or folder.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flat(settings).items()]
        for first in range(0, len(params), 100):  # as many as the library takes at once
            self._client.log_batch(self.name, params=params[first : first + 100])

    def log(self, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in numbers.items()]
        self._client.log_batch(self.name, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.name)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class Trackers:
    """All trackers of a run that are asked for.

    Args:
        folder: the run's. settings: the run's config, in plain values, to be shown. sent: the last step that an earlier
            process sent; up to it nothing is sent again.

    Raises:
        ValueError: in one line, if a tracker does not take the run at the start.
    """

    def __init__(self, tracking: TrackingSection, folder: Path, settings: dict[str, Any], sent: int) -> None:
        self._sent, self._failed = sent, set[str]()
        self._trackers: dict[str, Tracker] = {}
        path = folder / NAMES
        names: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
        for key, kind in (("wandb", WandbTracker), ("mlflow", MlflowTracker)):
            section = getattr(tracking, key)
            if section is None:
                continue
            try:
                tracker = kind(section, folder, names.get(key), settings)
            except Exception as error:  # each library has its own kinds
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"tracking.{key}: the run cannot be opened: {reason}") from error
            names[key], self._trackers[key] = tracker.name, tracker
        if self._trackers:
            write_text(path, json.dumps(names) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Send a record of metrics.jsonl."""
        step = record["step"]
        if step <= self._sent:
            return
        numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
        for key, tracker in self._trackers.items():
            self._try(key, lambda tracker=tracker: tracker.log(step, numbers))  # type: ignore[misc]

    def close(self) -> None:
        for key, tracker in self._trackers.items():
            self._try(key, tracker.close)

    def _try(self, key: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # of a library, a network, a server: none of them is worth a run
            if key not in self._failed:
                self._failed.add(key)
                logger.warning("tracking.%s does not take the metrics, training goes on: %s", key, error)
