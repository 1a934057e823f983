"""LoLCATs (2410.10254): attention over a window and Hedgehog's linear attention before it, under one sum.

Feature maps and the window's weight learn to give the teacher's attention output, layer by layer; then adapters on the
projections learn to predict text. Paper and code differ:

- the code's configs train "tk" windows (a block and the one before it) and decode with sliding ones, 52 to 60 %
  away from what was trained. Here windows slide in both.
- the code lowers the rate by ten where ten evaluations in a row bring nothing, of some 24 in all; here it is constant.
- the code's text is instructions, its second loss is of answers alone; here it is that of the corpus, all of it.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from megalodon.linearize import losses
from megalodon.linearize.config import LinearizeConfig, LoraSection, StageSection
from megalodon.linearize.recipe import FineTune, Lesson, Recipe, Stage, Transfer, beyond_reach
from megalodon.models.kin import KinConfig
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.schedule import ScheduleConfig

ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.0, "max_grad_norm": None}


class Config(LinearizeConfig):
    """window: W. feature_dim: of the maps; null: the head's size. train_maps: in the second stage too."""

    window: int = Field(default=64, ge=1)
    feature_dim: int | None = Field(default=None, ge=1)
    affine: bool = Field(default=False, description="weigh the linear part with one minus the window's weight")
    train_maps: bool = Field(default=False, description="let feature maps and window weights move in finetune too")
    transfer: StageSection = StageSection(
        optimizer=OptimizerConfig(learning_rate=1e-2, **ADAMW), schedule=ScheduleConfig(kind="constant")
    )
    finetune: StageSection = StageSection(
        optimizer=OptimizerConfig(learning_rate=1e-4, **ADAMW), schedule=ScheduleConfig(kind="constant")
    )
    lora: LoraSection = LoraSection()


def output_error(lesson: Lesson) -> Tensor:
    """1000 times the mean square of the difference between the heads' outputs, before the output projection."""
    heads, _ = lesson.student.head_outputs(lesson.x, None, lesson.layout)
    return losses.attention_transfer(heads, lesson.heads)


class LoLCATs(Recipe):
    name = "lolcats"
    summary = "a softmax window and trained features under one sum; attention transfer, then LoRA"
    config = Config

    def mixer(self, settings: Config, teacher: KinConfig, layer: int) -> dict[str, Any]:
        own = {"window": settings.window, "feature_dim": settings.feature_dim, "affine": settings.affine}
        return {"name": "lolcats", **own}

    def problems(self, settings: Config, teacher: KinConfig) -> list[str]:
        return beyond_reach(settings, "window", settings.window)

    def stages(self, settings: Config) -> list[Stage]:
        maps = r"feature_map_[qk]\..*|window_logit"
        beside = rf".*\.mixer\.({maps})" if settings.train_maps else ""
        return [
            Transfer("transfer", settings.transfer, output_error, maps),
            FineTune("finetune", settings.finetune, beside, settings.lora),
        ]
