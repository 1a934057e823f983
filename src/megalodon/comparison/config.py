"""The description of a comparison: architectures, what all share, the sweep, the tests; read from YAML and checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from megalodon.data import CorpusConfig
from megalodon.training.config import TrainConfig
from megalodon.training.config_file import check_config, read_values
from megalodon.training.section import Section
from megalodon.training.wording import describe_errors, one_message

NAME = re.compile(r"[\w.+-]+")
SET_HERE = {
    "optimizer.learning_rate": "the sweep chooses it",
    "run.seed": "seeds names them",
    "run.folder": "every run has its own under folder",
    "model": "architectures has one each",
}
"""What the shared training config leaves to the comparison."""


class Entry(Section):
    """One architecture of a comparison."""

    model: dict[str, Any] = Field(description="the model section of a training config")
    scale: list[str] = Field(
        default=["model_dim"],
        min_length=1,
        description="sizes that grow together, in proportion, until the parameters match; the first is the width",
    )
    adjust: str | None = Field(
        default="ffn_hidden_dim", description="the size that makes up for the rest, in steps of 8; null: none"
    )
    train: dict[str, Any] = Field(default={}, description="what it has otherwise than the shared training config")
    cut: int | None = Field(
        default=None,
        ge=1,
        description="tokens after which it forgets everything while whole texts are scored; null: never, or after "
        "data.sequence_length where the state grows or was not carried in training",
    )


class SweepSection(Section):
    """Learning rates that every architecture is trained with; the one of the least held-out loss is chosen."""

    learning_rates: list[float] = Field(default=[1e-3, 2e-3, 4e-3], min_length=3)
    steps: int | None = Field(default=None, ge=1, description="of a run of the sweep; null: run.steps, a whole run")
    widen: int = Field(default=6, ge=0, description="rates that may be added on a side while the best is at the edge")

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, rates: list[float]) -> list[float]:
        if sorted(set(rates)) != rates or rates[0] <= 0:
            raise ValueError("rates are positive and ascend, each given once")
        return rates


class TestSection(Section):
    """Texts that every trained model is scored on, whole."""

    __test__ = False  # nothing for pytest

    corpus: CorpusConfig | None = Field(default=None, description="no text of which may be in training or held out")
    max_tokens: int | None = Field(default=None, ge=2, description="read only so many tokens of each text")
    context: int = Field(
        default=8192, ge=1, description="loss by position: everything is forgotten after every so many tokens"
    )
    context_tokens: int | None = Field(
        default=262_144, ge=2, description="tokens of each text that loss by position is measured on; null: all"
    )


class SpeedSection(Section):
    """Lengths at which memory and speed are measured, each architecture alone on the machine."""

    lengths: list[int] = Field(default=[1024, 4096, 16384], min_length=1)
    steps: int = Field(default=8, ge=2, description="timed training steps, of which the median counts")
    decode: int = Field(default=16, ge=1, description="tokens decoded after reading each length")


class EqualTime(Section):
    """Runs that are as long as fit into one time, by each architecture's seconds a step on this machine."""

    seconds: float | None = Field(default=None, gt=0, description="null: what the quickest takes for run.steps")


class CompareConfig(Section):
    """All of it."""

    folder: str
    architectures: dict[str, Entry] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    parameters: int | None = Field(default=None, ge=1, description="to match; null: those of the first architecture")
    tolerance: float = Field(default=0.01, gt=0, le=0.2)
    train: dict[str, Any] = Field(default={}, description="a training config without its model, shared by all")
    sweep: SweepSection = SweepSection()
    equal_time: EqualTime | None = Field(default=EqualTime(), description="null: no runs at equal time")
    test: TestSection = TestSection()
    speed: SpeedSection = SpeedSection()
    recall: dict[str, str] = Field(
        default={},
        description="task -> results.jsonl of `megalodon evaluate recall`, whose models of an architecture's name are "
        "shown beside it",
    )
    processes: int | None = Field(default=None, ge=1, description="runs side by side; null: as the processors allow")
    threads: int = Field(default=1, ge=1, description="of each process")

    @field_validator("architectures")
    @classmethod
    def _names(cls, entries: dict[str, Entry]) -> dict[str, Entry]:
        for name in entries:
            if not NAME.fullmatch(name):
                raise ValueError(f"an architecture's name, {name!r}, is made of letters, digits, dots and dashes")
        return entries


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them."""
    out = dict(base)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return out


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> CompareConfig:
    """The comparison in a YAML file with `key=value` overrides laid over it, checked as a whole.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming every unknown key and wrong value; an architecture that does not make a training config; or
            what would make the comparison unfair, such as batches that are not the same.
    """
    values = read_values(path, overrides)
    try:
        config = CompareConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_message(str(path), describe_errors(error, CompareConfig))) from None
    problems = [
        f"{where}.{key}: not here, {why}"
        for where, given in [
            ("train", config.train),
            *((f"architectures.{name}.train", entry.train) for name, entry in config.architectures.items()),
        ]
        for key, why in SET_HERE.items()
        if _has(given, key)
    ]
    if len(set(config.seeds)) != len(config.seeds):
        problems.append("seeds: each is given once")
    if problems:
        raise ValueError(one_message(str(path), problems))
    _check_fairness(config, {name: train_config_of(config, name) for name in config.architectures}, str(path))
    return config


def train_config_of(
    config: CompareConfig,
    name: str,
    *,
    model: dict[str, Any] | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    steps: int | None = None,
    folder: str = "run",
) -> TrainConfig:
    """The training config of an architecture.

    A run of other than `run.steps` steps is the same run stretched: its warm-up, its evaluations and its checkpoints
    keep their share.

    Args:
        model: the section with its sizes matched; None: as it is given.

    Raises:
        ValueError: as `check_config`, naming the architecture.
    """
    entry = config.architectures[name]
    values = merged(config.train, entry.train)
    values = merged({"checkpoint": {"keep": 1}}, values)
    where = f"architectures.{name}"
    whole = check_config({**values, "model": entry.model if model is None else model}, where)
    total = whole.run.steps
    steps = total if steps is None else steps

    def share(count: int) -> int:
        return max(1, round(count * steps / total))

    changes: dict[str, Any] = {
        "run": {"steps": steps, "folder": folder, "seed": config.seeds[0] if seed is None else seed},
        "optimizer": {"learning_rate": config.sweep.learning_rates[0] if learning_rate is None else learning_rate},
        "schedule": {"warmup_steps": min(share(whole.schedule.warmup_steps), steps - 1)}
        if whole.schedule.warmup_steps
        else {},
        "checkpoint": {"every": min(whole.checkpoint.every, steps)},
    }
    if whole.evaluation.every is not None:
        changes["evaluation"] = {"every": share(min(whole.evaluation.every, total))}
    return check_config({**merged(values, changes), "model": entry.model if model is None else model}, where)


def _has(values: dict[str, Any], dotted: str) -> bool:
    *owners, last = dotted.split(".")
    for owner in owners:
        inner = values.get(owner)
        if not isinstance(inner, dict):
            return False
        values = inner
    return last in values


def _check_fairness(config: CompareConfig, configs: dict[str, TrainConfig], where: str) -> None:
    """Refuse architectures that would not read the same batches in the same order, or not be measured alike."""
    problems = []
    first_name, first = next(iter(configs.items()))
    own = _shared_settings(first)
    for name, other in configs.items():
        if other.evaluation.every is None:
            problems.append(f"{name}: evaluation.every is null, but rates are chosen by the held-out loss")
        theirs = _shared_settings(other)
        problems += [
            f"architectures.{name}: {key} is {theirs.get(key)!r}, {own.get(key)!r} with {first_name}: all must read "
            "the same batches"
            for key in dict.fromkeys([*own, *theirs])
            if theirs.get(key) != own.get(key)
        ]
        if other.mesh.sizes.world_size > 1:
            problems.append(f"architectures.{name}.train.mesh: runs of a comparison have one process each")
    modes = {name: each.data.mode for name, each in configs.items()}
    packed = [name for name, mode in modes.items() if mode == "packed"]
    if packed and len(packed) < len(modes):
        problems.append(
            f"architectures.{packed[0]}: data.mode packed reads other batches than streamed and reset: give reset"
        )
    if config.sweep.steps is not None and config.sweep.steps > first.run.steps:
        problems.append(f"sweep.steps: {config.sweep.steps} is more than train.run.steps ({first.run.steps})")
    if problems:
        raise ValueError(one_message(where, problems))


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    """Of a training config, what decides on the batches, how many there are and how they are measured, by key."""
    run = config.run.model_dump(mode="json", include={"steps", "precision", "device"})
    values: dict[str, Any] = {"data": config.data.model_dump(mode="json", exclude={"mode", "cache_folder"}), "run": run}
    values |= {"tokenizer": config.tokenizer, "evaluation": config.evaluation.model_dump(mode="json")}
    return dict(_flat(values))


def _flat(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, name))
        else:
            yield ".".join((*path, name)), value
