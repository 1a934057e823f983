"""Lizard (2507.09025): gated linear attention over everything plus softmax over a window with sinks.

There is no published code. Stages, rates, 20M tokens in each, rows of 2048 and rank are the paper's. What it leaves
open, and what is done here (the documentation has what each costs):

- a gate of one number a token, shared by heads, as its shape says; it has a bias, without which memory would fade by
  half with every token. `gate_bias` is where it starts.
- alpha, the window's share, one a head: it moves in the transfer with maps, gate and sinks. `alpha` is where it starts.
- sinks are exp of trained numbers, one set a head.
- `rotary`: the teacher's queries and keys were trained to turn; the paper's formulas turn neither part.
- the squared distance is that of the heads' outputs, before the output projection.
- features are softmax, as one of its tables has them; its section 4 needs exp.
- weight decay is not said: none. Maps, gate, alpha and sinks rest in the second stage, unless `train_maps`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from megalodon.linearize import losses
from megalodon.linearize.config import LinearizeConfig, LoraSection, StageSection, packed
from megalodon.linearize.recipe import FineTune, Lesson, Recipe, Stage, Transfer
from megalodon.linearize.recipes.mohawk import warmed
from megalodon.models.kin import KinConfig
from megalodon.training.data_section import DataSection
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.schedule import ScheduleConfig

SCHEDULE = ScheduleConfig(kind="cosine", end_ratio=0.1)


def adamw(learning_rate: float) -> OptimizerConfig:
    """The paper's."""
    return OptimizerConfig(learning_rate=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, max_grad_norm=1.0)


class Config(LinearizeConfig):
    """window: W. sinks: m. feature_dim: of the maps; null: the head's size. warmup: as of mohawk. The rest is in the
    recipe's own words above."""

    data: DataSection = packed(8, 2048)
    window: int = Field(default=128, ge=1)
    sinks: int = Field(default=4, ge=0)
    feature_dim: int | None = Field(default=None, ge=1)
    rotary: bool = Field(default=False, description="turn queries and keys by their places, in both parts")
    gate_bias: float = Field(default=4.0, description="of the gate at the start: sigmoid of it is what a token keeps")
    alpha: float = Field(default=1.0, description="the window's share at the start")
    train_maps: bool = Field(default=False, description="let maps, gate, alpha and sinks move in finetune too")
    warmup: float = Field(default=0.1, ge=0, lt=1)
    transfer: StageSection = StageSection(optimizer=adamw(1e-3), schedule=SCHEDULE)
    finetune: StageSection = StageSection(optimizer=adamw(5e-4), schedule=SCHEDULE)
    lora: LoraSection = LoraSection(targets=["q_proj", "k_proj", "v_proj"])


def squared_error(lesson: Lesson) -> Tensor:
    """The squared distance of the heads' outputs from the teacher's."""
    heads, _ = lesson.student.head_outputs(lesson.x, None, lesson.layout)
    return losses.squared_distance(heads, lesson.heads)


class Lizard(Recipe):
    name = "lizard"
    summary = "gated linear attention plus a softmax window with sinks; outputs, then LoRA"
    config = Config

    def mixer(self, settings: Config, teacher: KinConfig, layer: int) -> dict[str, Any]:
        names = ("window", "sinks", "feature_dim", "rotary", "gate_bias", "alpha")
        return {"name": "lizard", **{name: getattr(settings, name) for name in names}}

    def stages(self, settings: Config) -> list[Stage]:
        new = r"feature_map_[qk]\..*|gate_proj\..*|alpha|sinks"
        transfer, finetune = (
            warmed(section, settings.data, settings.warmup) for section in (settings.transfer, settings.finetune)
        )
        beside = rf".*\.mixer\.({new})" if settings.train_maps else ""
        return [
            Transfer("transfer", transfer, squared_error, new),
            FineTune("finetune", finetune, beside, settings.lora),
        ]
