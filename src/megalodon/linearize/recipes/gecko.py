"""Ours: attention over two chunks as the teacher has it, and Gecko's working memory of all before, opened by a gate.

Each part is what one of the papers' recipes showed to help, or what their trouble was:

- Softmax stays where it matters most, near the token (LoLCATs, Lizard), in chunks that decode as they were trained. At
  the start the gate is shut and the model is the teacher with a window: there is nothing to repair but what lies
  beyond it, and a text of up to two chunks is read as the teacher reads it, after the transfer too.
- The memory absorbs a chunk when it leaves the window, by Gecko's delta rule and log masses: it has no decay, and its
  entries stay of one size however long the text is, where plain sums grow.
- Its keys and queries are not turned: what lies far away has no place that the teacher never met.
- Maps and gate learn the heads' outputs layer by layer (LoLCATs' transfer, before the output projection), at a low
  rate and not for long: past some point outputs come nearer the teacher's and predictions do not. Then adapters learn
  the teacher's distribution on the whole model (the distillation study); maps and gate move on beside them. The next
  token's loss is off: it pulls a model that already agrees with its teacher towards the rows at hand.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megalodon.linearize.config import LoraSection, StageSection
from megalodon.linearize.recipe import FineTune, Recipe, Stage, Transfer, beyond_reach
from megalodon.linearize.recipes.distill import Likeness, objective
from megalodon.linearize.recipes.lolcats import ADAMW, output_error
from megalodon.models.kin import KinConfig
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.schedule import ScheduleConfig


class Config(Likeness):
    """chunk_size: C; a token sees itself and C to 2C - 1 before it. feature_dim: rows of the memory; null: twice the
    head's size. train_memory: maps and gate move in the second stage too."""

    chunk_size: int = Field(default=64, ge=1)
    feature_dim: int | None = Field(default=None, ge=1)
    train_memory: bool = Field(default=True, description="let maps and gate of the memory move in finetune too")
    next_token: float = Field(default=0.0, ge=0, description="weight of the next token's cross-entropy")
    hidden: float = Field(default=0.0, ge=0, description="weight of the distance of hidden states; 0: they are free")
    transfer: StageSection = StageSection(
        tokens=2_000_000, optimizer=OptimizerConfig(learning_rate=1e-3, **ADAMW), schedule=ScheduleConfig(kind="cosine")
    )
    finetune: StageSection = StageSection(
        optimizer=OptimizerConfig(learning_rate=1e-3, **ADAMW), schedule=ScheduleConfig(kind="cosine")
    )
    lora: LoraSection | None = Field(default=LoraSection(), description="null: all weights move")


class Gecko(Recipe):
    name = "gecko"
    summary = "attention over two chunks, a gated working memory before them; outputs, then LoRA and distributions"
    config = Config

    def mixer(self, settings: Config, teacher: KinConfig, layer: int) -> dict[str, Any]:
        return {"name": "window_memory", "chunk_size": settings.chunk_size, "feature_dim": settings.feature_dim}

    def problems(self, settings: Config, teacher: KinConfig) -> list[str]:
        return beyond_reach(settings, "chunk_size", 2 * settings.chunk_size)

    def stages(self, settings: Config) -> list[Stage]:
        new = r"memory_maps|gate_proj\..*"
        moves = ".*" if settings.lora is None else rf".*\.mixer\.({new})" if settings.train_memory else ""
        wanted = objective(settings) if settings.logits or settings.hidden else None
        return [
            Transfer("transfer", settings.transfer, output_error, new),
            FineTune("finetune", settings.finetune, moves, settings.lora, wanted),
        ]
