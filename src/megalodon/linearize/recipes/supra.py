"""SUPRA (2405.06640): linear attention with fixed decays and a norm in place of the normaliser, by up-training alone.

New are the maps of queries and keys, drawn as linear layers are; all weights train on the next token. No stage mimics
softmax: the paper's trial of one gave nothing. Paper and code differ: the paper speaks of decays "as in RetNet", the
code's default is like ALiBi's (`decay`); the paper has one map for queries and keys, the code two for grouped heads.
The code's README adds a z-loss of 1e-4, which is not here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megalodon.linearize.config import LinearizeConfig, StageSection, packed
from megalodon.linearize.recipe import FineTune, Recipe, Stage
from megalodon.models.kin import KinConfig
from megalodon.training.data_section import DataSection
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.schedule import ScheduleConfig


class Config(LinearizeConfig):
    """decay: slopes as of ALiBi, of RetNet, or none."""

    data: DataSection = packed(8, 2048)
    decay: Literal["alibi", "retnet", "none"] = "alibi"
    qk_norm: bool = Field(default=False, description="a norm of all heads together, as the 1B model has it")
    finetune: StageSection = StageSection(
        optimizer=OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0),
        schedule=ScheduleConfig(kind="cosine", end_ratio=1 / 30),
    )


class Supra(Recipe):
    name = "supra"
    summary = "linear attention with fixed decays; all weights train on"
    config = Config

    def mixer(self, settings: Config, teacher: KinConfig, layer: int) -> dict[str, Any]:
        return {"name": "retention", "decay": settings.decay, "qk_norm": settings.qk_norm}

    def stages(self, settings: Config) -> list[Stage]:
        return [FineTune("finetune", settings.finetune, ".*")]
