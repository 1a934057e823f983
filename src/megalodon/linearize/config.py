"""What a linearisation is told: text, memory, and the stages of its recipe. Each recipe adds its own sections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from megalodon.training.config import CheckpointConfig, EvaluationConfig
from megalodon.training.config_file import lay_over, parse_yaml
from megalodon.training.data_section import DataSection, data_problems
from megalodon.training.optimizer import OptimizerConfig, optimizer_problems
from megalodon.training.schedule import ScheduleConfig, schedule_problems
from megalodon.training.section import Section, changeable
from megalodon.training.wording import describe_errors, one_message


class RunSection(Section):
    """How steps are computed, in every stage."""

    seed: int = Field(default=0, ge=0)
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: of the teacher's weights and of activations; what trains is float32"
    )
    device: str = changeable("auto", description="auto: the GPU if there is one; or cpu, cuda, cuda:1, mps")
    gradient_checkpointing: bool = changeable(False, description="compute blocks twice, to save memory")
    log_every: int = changeable(1, ge=1, description="steps between lines of metrics.jsonl")


class MemorySection(Section):
    """What is held at a time while layers learn from the teacher's."""

    layers_at_once: int | None = Field(
        default=None, ge=1, description="blocks in memory; null: all, so that the text is read once"
    )
    activations: Literal["recompute", "disk"] = Field(
        default="recompute",
        description="whence a block's inputs come where blocks before it are not in memory: computed again, or kept "
        "on the disk by the blocks before",
    )


class KeepSection(Section):
    """How keep_attention=auto chooses: the layers that lose most when they see the last tokens alone."""

    count: int | None = Field(default=None, ge=1, description="layers that stay; null: a quarter of them, rounded up")
    window: int = Field(default=64, ge=1, description="the last tokens that a layer sees while its cost is measured")
    tokens: int = Field(default=8192, ge=1, description="measured on; whole rows, rounded up")

    def number(self, layers: int) -> int:
        """Layers that stay, of so many."""
        return -(-layers // 4) if self.count is None else self.count


class StageSection(Section):
    """One stage: how long, and how its weights move."""

    tokens: int = Field(default=20_000_000, ge=1, description="read in the stage; whole steps, rounded up")
    accumulation_steps: int = Field(default=1, ge=1, description="parts in which a step is computed, to save memory")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def steps(self, data: DataSection) -> int:
        """Updates of the weights."""
        return -(-self.tokens // (data.batch_size * data.sequence_length))


class LoraSection(Section):
    """Adapters of PEFT."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1, description="linear layers of every block"
    )


def packed(batch_size: int, sequence_length: int) -> DataSection:
    """The data section of a recipe."""
    return DataSection(mode="packed", batch_size=batch_size, sequence_length=sequence_length)


class LinearizeConfig(Section):
    """What all recipes share. A recipe's own config adds sections."""

    tokenizer: str | None = Field(default=None, description="null: that in the teacher's folder")
    keep_attention: list[int] | Literal["auto"] = Field(
        default=[], description="layers that stay as they are, from 0; auto: as keep says"
    )
    keep: KeepSection = KeepSection()
    data: DataSection = packed(8, 1024)
    run: RunSection = RunSection()
    memory: MemorySection = MemorySection()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig(max_tokens=100_000)

    @field_validator("data", mode="before")
    @classmethod
    def _recipes_own(cls, given: Any) -> Any:
        """What is not given of the data is as the recipe has it, not as training does."""
        if isinstance(given, dict):
            own = cls.model_fields["data"].default
            return {**{name: getattr(own, name) for name in ("mode", "batch_size", "sequence_length")}, **given}
        return given

    def stage_sections(self) -> dict[str, StageSection]:
        """The stages' sections by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, StageSection)}

    def problems(self) -> list[str]:
        """What is wrong with the values taken together, one sentence each; empty when all is well."""
        found = data_problems(self.data)
        if self.data.mode != "packed":
            found.append("data.mode: a teacher reads rows of its own length, so they must be packed")
        for name, stage in self.stage_sections().items():
            told = [*optimizer_problems(stage.optimizer), *schedule_problems(stage.schedule, stage.steps(self.data))]
            found += [f"{name}.{problem}" for problem in told]
            if self.data.batch_size % stage.accumulation_steps:
                found.append(
                    f"{name}.accumulation_steps: {stage.accumulation_steps} must divide data.batch_size "
                    f"({self.data.batch_size}), the rows of a step"
                )
        if self.keep_attention != "auto" and self.keep != KeepSection():
            found.append("keep: it is for keep_attention=auto; keep_attention names the layers")
        if self.memory.activations == "disk" and self.memory.layers_at_once is None:
            found.append("memory.activations: disk is for blocks in turn; give memory.layers_at_once too")
        return found


def read_config(kind: type[LinearizeConfig], file: Path | None, overrides: Iterable[str]) -> LinearizeConfig:
    """The config of a recipe: `key=value` over what a YAML file says over the recipe's defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming every unknown key, wrong value and contradiction at once.
    """
    values: Any = {}
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"there is no config file {file}")
        values = parse_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{file}: a config is a mapping of sections, not a {type(values).__name__}")
    for override in overrides:
        lay_over(values, override)
    return check(kind, values, "linearize" if file is None else str(file))


def check(kind: type[LinearizeConfig], values: dict[str, Any], where: str) -> LinearizeConfig:
    """Plain values as a config.

    Raises:
        ValueError: naming every problem at once.
    """
    values = {name: _completed(kind, name, value) for name, value in values.items()}
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_message(where, describe_errors(error, kind))) from None
    problems: Sequence[str] = config.problems()
    if problems:
        raise ValueError(one_message(where, problems))
    return config


def _completed(kind: type[LinearizeConfig], name: str, given: Any) -> Any:
    """What is given of a stage over the recipe's own values of it, which are not those of any stage."""
    field = kind.model_fields.get(name)
    if field is None or not isinstance(field.default, StageSection | LoraSection) or not isinstance(given, dict):
        return given

    def over(own: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return own | {
            key: over(own[key], value) if isinstance(own.get(key), dict) and isinstance(value, dict) else value
            for key, value in new.items()
        }

    return over(field.default.model_dump(), given)
