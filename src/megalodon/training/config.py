"""The whole description of a training run: the sections of its YAML file, their defaults, and what contradicts what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, Field, create_model, field_validator

from megalodon.training.checkpoint import ResumeMode
from megalodon.training.data_section import DataSection, data_problems
from megalodon.training.mesh_section import MeshSection
from megalodon.training.model_section import (
    DEFAULT_ARCHITECTURE,
    ModelSection,
    model_problems,
    model_section,
    streaming_problems,
)
from megalodon.training.optimizer import OptimizerConfig, optimizer_problems
from megalodon.training.schedule import ScheduleConfig, length_change, schedule_problems
from megalodon.training.section import CHANGEABLE, Section, changeable
from megalodon.training.trackers import TrackingSection


class RunConfig(Section):
    """Where the run is kept, how long it is, and how a step is computed."""

    folder: str | None = changeable(None, description="the run's folder; null: runs/ and the config file's name")
    steps: int = Field(default=1000, ge=1, description="updates of the weights")
    seed: int = Field(default=0, ge=0)
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: autocast over float32 weights"
    )
    device: str = changeable("auto", description="auto: the GPU if there is one; or cpu, cuda, cuda:1, mps")
    accumulation_steps: int = Field(default=1, ge=1, description="parts in which a step is computed, to save memory")
    gradient_checkpointing: bool = changeable(False, description="compute blocks twice, to save memory")
    compile: bool = changeable(False, description="torch.compile the blocks")
    log_every: int = changeable(1, ge=1, description="steps between lines of metrics.jsonl")
    resume: ResumeMode = changeable(
        "auto", description="previous: pass over damaged checkpoints; never: refuse old ones"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _no_float16(cls, value: Any) -> Any:
        if value in ("float16", "fp16", "half"):
            raise ValueError(f"{value} has too little range for Megalodon's memory: use bfloat16 or float32")
        return value


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every: int = changeable(500, ge=1, description="steps between checkpoints; the last step always has one")
    keep: int = changeable(2, ge=1, description="how many of the latest to keep")
    keep_best: bool = changeable(False, description="also keep the one with the lowest held-out loss")


class EvaluationConfig(Section):
    """Periodic loss on held-out documents."""

    every: int | None = changeable(500, ge=1, description="steps between measurements; null: never")
    max_tokens: int | None = changeable(1_000_000, ge=1, description="measure on the first so many; null: on all")


class SamplingConfig(Section):
    """Periodic continuations of a prompt, to read."""

    every: int | None = changeable(None, ge=1, description="steps between samples; null: never")
    prompt: str = changeable("\n", min_length=1)
    max_new_tokens: int = changeable(200, ge=1)
    temperature: float = changeable(0.8, ge=0, description="0: always the likeliest token")
    top_p: float = changeable(0.95, gt=0, le=1)


class TrainConfig(Section):
    """All of it. Every key has a default but those that must be chosen."""

    model: ModelSection = ModelSection()
    tokenizer: str | None = Field(
        default=None, description="bytes, a folder, a tokenizer.json or a hub name; null: that of init_from, else bytes"
    )
    data: DataSection = DataSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: RunConfig = RunConfig()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sampling: SamplingConfig = SamplingConfig()
    tracking: TrackingSection = TrackingSection()


@cache
def train_config(architecture: str) -> type[TrainConfig]:
    """The config of runs that train a model of this architecture: it knows the fields of its `model` section."""
    if architecture == DEFAULT_ARCHITECTURE:
        return TrainConfig
    section = model_section(architecture)
    return create_model("TrainConfig", __base__=TrainConfig, model=(section, section()))


def contradictions(config: TrainConfig) -> list[str]:
    """What is wrong with the values taken together, one sentence each, naming the key; empty when all is well."""
    problems = [
        *model_problems(config.model),
        *streaming_problems(config.model, config.data.mode),
        *data_problems(config.data),
        *optimizer_problems(config.optimizer),
        *schedule_problems(config.schedule, config.run.steps),
    ]
    if config.data.batch_size % config.run.accumulation_steps:
        problems.append(
            f"run.accumulation_steps: {config.run.accumulation_steps} must divide data.batch_size "
            f"({config.data.batch_size}), the rows of a step"
        )
    every = config.evaluation.every
    if config.checkpoint.keep_best and every is None:
        problems.append("checkpoint.keep_best: needs held-out losses; set evaluation.every")
    elif config.checkpoint.keep_best and every is not None and config.checkpoint.every % every:
        problems.append(
            f"checkpoint.keep_best: checkpoint.every ({config.checkpoint.every}) must be a multiple of "
            f"evaluation.every ({every}), so that each checkpoint has a held-out loss"
        )
    return problems


# Where a corpus lies is no matter: a checkpoint knows the text itself, and notices another one.
PLACES = re.compile(r"data\.(mixture\.[\w.-]+\.)?(corpus|held_out\.corpus)\.(source|data_files)")


def common_settings(config: TrainConfig) -> dict[str, Any]:
    """What is the same on all ranks of a run, by dotted key; the places of its files may not be."""

    def flat(values: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from flat(value, (*path, name))
            else:
                yield ".".join((*path, name)), value

    own = flat(config.model_dump(mode="json"), ())
    return {key: value for key, value in own if not PLACES.fullmatch(key) and key != "data.cache_folder"}


def differences(old: TrainConfig, new: TrainConfig, step: int) -> tuple[list[str], str | None]:
    """What a run resumed after `step` must not change but does: `optimizer.learning_rate: 0.001 before, 0.002 now`, by
    key; and what there is to say of a change that it may make, or None."""
    if old.model.architecture != new.model.architecture:
        return [f"model.architecture: {old.model.architecture} before, {new.model.architecture} now"], None
    found = {
        key: f"{key}: {before!r} before, {now!r} now"
        for key, before, now in changed_fields(old, new)
        if not PLACES.fullmatch(key)
    }
    note = None
    if "run.steps" in found:
        refused, note = length_change(new.schedule, new.optimizer.learning_rate, old.run.steps, new.run.steps, step)
        if refused is None:
            del found["run.steps"]
        else:
            found["run.steps"] = f"{found['run.steps']}: {refused}"
    return list(found.values()), note


def _is_sections(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, BaseModel) for each in value.values())


def changed_fields(old: BaseModel, new: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of every field that differs and may not change."""
    for name, field in type(old).model_fields.items():
        before, now = getattr(old, name), getattr(new, name)
        inside = (*path, name)
        if _is_sections(before) and _is_sections(now) and before.keys() == now.keys():
            for key in before:
                yield from changed_fields(before[key], now[key], (*inside, key))
        elif isinstance(before, BaseModel) and type(before) is type(now):
            yield from changed_fields(before, now, inside)
        elif before != now and not (
            isinstance(field.json_schema_extra, dict) and CHANGEABLE in field.json_schema_extra
        ):
            yield ".".join(inside), before, now
