"""A recall study in YAML: the task, the models and their widths, and how each of them is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from megalodon.evaluation.recall.joint_recall import JointRecall
from megalodon.evaluation.recall.mqar import MQAR
from megalodon.evaluation.recall.questions import Segment, segment_seeds
from megalodon.evaluation.recall.synthetic import Induction, SelectiveCopying
from megalodon.models import Config, architecture
from megalodon.training.config_file import read_values
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.section import Section
from megalodon.training.wording import describe_errors, one_message

TASKS: dict[str, type[Segment]] = {
    "mqar": MQAR,
    "joint_recall": JointRecall,
    "induction": Induction,
    "selective_copying": SelectiveCopying,
}
"""Every task that models are trained on, by name. A new one is a file here and a line."""

PROTOCOL = 1
"""Raised where the same config would give other results than before: old results then no longer count."""


class TrainingSection(Section):
    """Zoology's protocol: AdamW on the mean loss of a batch's questions, batches in their order, cosine by epoch."""

    batch_size: int = Field(default=256, ge=1)
    epochs: int = Field(default=32, ge=1)
    learning_rates: list[float] = Field(default=[1e-3, 3.2e-3, 1e-2], min_length=1, description="the best one counts")
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = Field(default=None, gt=0, description="null: gradients are not clipped")
    stop_above: float = Field(default=0.99, gt=0, description="stop at this mean accuracy over the test segments")
    seconds: float | None = Field(default=None, gt=0, description="begin no epoch after so long; null: all epochs")

    def optimizer(self, learning_rate: float) -> OptimizerConfig:
        """As the trainer's optimiser is built from."""
        return OptimizerConfig(
            learning_rate=learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
            max_grad_norm=self.max_grad_norm,
        )


class RecallConfig(Section):
    """All of it."""

    task: Literal["mqar", "joint_recall", "induction", "selective_copying"]
    common: dict[str, Any] = Field(default={}, description="fields of all segments")
    train: list[dict[str, Any]] = Field(min_length=1, description="segments, read one after another in every epoch")
    test: list[dict[str, Any]] = Field(min_length=1)
    data_seed: int = Field(default=123, ge=0)
    widths: list[int] = Field(min_length=1, description="model_dim of each model that does not give its own")
    shared: dict[str, Any] = Field(default={}, description="config fields of all models, unless they give their own")
    models: dict[str, dict[str, Any]] = Field(min_length=1, description="name: architecture and config fields")
    training: TrainingSection = TrainingSection()
    seeds: list[int] = Field(default=[0], min_length=1)

    @cached_property
    def train_segments(self) -> list[Segment]:
        return [TASKS[self.task](**{**self.common, **given}) for given in self.train]

    @cached_property
    def test_segments(self) -> list[Segment]:
        return [TASKS[self.task](**{**self.common, **given}) for given in self.test]

    @property
    def vocab_size(self) -> int:
        """That of the models."""
        return max(segment.tokens for segment in (*self.train_segments, *self.test_segments))

    def seeds_of_segments(self) -> tuple[list[int], list[int]]:
        """Of training and of test segments."""
        return segment_seeds(self.data_seed, len(self.train), len(self.test))

    def model_config_of(self, name: str, width: int) -> Config:
        """The config of a model at a width."""
        given = self.models[name]
        kind = given.get("architecture", self.shared.get("architecture", "megalodon-kin"))
        fields = {"model_dim": width, **self.shared, **given, "vocab_size": self.vocab_size}
        fields.pop("architecture", None)
        return architecture(kind).config(**fields)

    def cells(self) -> list[Cell]:
        """Every run of the study: small widths first, so that a table fills evenly."""
        found = [
            Cell(name, int(given.get("model_dim", width)), rate, seed)
            for width in self.widths
            for name, given in self.models.items()
            for seed in self.seeds
            for rate in self.training.learning_rates
        ]
        return list(dict.fromkeys(found))

    def fingerprint(self, cell: Cell) -> str:
        """Of all that the result of a cell depends on; the training's other rates and the study's other models do not
        change it."""
        training = self.training.model_dump(mode="json", exclude={"learning_rates"})
        model = self.model_config_of(cell.model, cell.width).to_diff_dict()
        for volatile in ("transformers_version", "auto_map"):
            model.pop(volatile, None)
        values = {
            "protocol": PROTOCOL,
            "task": self.task,
            "segments": [[segment.model_dump(mode="json") for segment in self.train_segments]],
            "test": [segment.model_dump(mode="json") for segment in self.test_segments],
            "data_seed": self.data_seed,
            "training": training,
            "model": model,
            "cell": [cell.width, cell.learning_rate, cell.seed],
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One run: a model, its width, a learning rate, and the seed of its first weights."""

    model: str
    width: int
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.model}, width {self.width}, rate {self.learning_rate:g}, seed {self.seed}"


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> RecallConfig:
    """The study in a YAML file with `key=value` overrides laid over it, checked as a whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming every unknown key, wrong value, segment or model that is not possible.
    """
    values = read_values(path, overrides)
    try:
        config = RecallConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_message(str(path), describe_errors(error, RecallConfig))) from None
    problems = []
    for where, given in (("train", config.train), ("test", config.test)):
        for number, fields in enumerate(given):
            kind = TASKS[config.task]
            try:
                found = kind(**{**config.common, **fields}).problems()
            except ValidationError as error:
                found = describe_errors(error, kind)
            problems += [f"{where}.{number}.{problem}" for problem in found]
    if not problems:
        for name in config.models:
            for width in config.widths:
                try:
                    config.model_config_of(name, width)
                except Exception as error:  # Transformers wraps what a config refuses in classes of its own
                    problems.append(f"models.{name}, width {width}: {error.__cause__ or error}")
    if problems:
        raise ValueError(one_message(str(path), problems))
    return config
