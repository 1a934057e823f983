"""Hedgehog (2402.04347): linear attention whose features are trained until its rows are the teacher's softmax rows.

First the maps learn by the cross-entropy of attention's rows, layer by layer; then adapters on the projections learn
to predict text, as the paper does with Llama-2 7B (rank 8, alpha 16), or all weights (`lora: null`), as with GPT-2.
The code draws the maps 8 times smaller than per head (its fan-in counts them all) unless it is told to begin with the
identity, which its commands do; here they begin so.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from megalodon.linearize import losses
from megalodon.linearize.config import LinearizeConfig, LoraSection, StageSection
from megalodon.linearize.recipe import FineTune, Lesson, Recipe, Stage, Transfer
from megalodon.linearize.recipes.lolcats import ADAMW
from megalodon.models.kin import KinConfig
from megalodon.models.kin.mixers.hedgehog import Hedgehog as HedgehogMixer
from megalodon.ops.layout import document_numbers
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.schedule import ScheduleConfig


class Config(LinearizeConfig):
    """feature_dim: columns of the maps; null: the head's size."""

    feature_dim: int | None = Field(default=None, ge=1)
    transfer: StageSection = StageSection(
        optimizer=OptimizerConfig(learning_rate=1e-2, **ADAMW), schedule=ScheduleConfig(kind="constant")
    )
    finetune: StageSection = StageSection(
        optimizer=OptimizerConfig(learning_rate=6e-4, **ADAMW), schedule=ScheduleConfig(kind="constant")
    )
    lora: LoraSection | None = Field(default=LoraSection(), description="null: all weights move")


def row_error(lesson: Lesson) -> Tensor:
    """The cross-entropy of the student's attention rows against the teacher's softmax rows, mean over all queries."""
    visible = seen(lesson)
    student = cast(HedgehogMixer, lesson.student)
    q, k, _ = student.queries_keys_values(lesson.x, lesson.layout, rotated=True)
    wanted = softmax_rows(lesson, q.detach(), k.detach(), visible)
    map_q, map_k = student.maps()
    weights = torch.einsum("blhf,bshf->bhls", map_q(q).float(), map_k(k).float()).masked_fill(~visible, 0)
    rows = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return losses.row_cross_entropy(rows, wanted)


def seen(lesson: Lesson) -> Tensor:
    """bool [B, 1, L, L]: the keys that each query may see."""
    documents = document_numbers(lesson.layout)
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (causal & (documents[:, :, None] == documents[:, None]))[:, None]


@torch.no_grad()
def softmax_rows(lesson: Lesson, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """[B, H, L, L]: the teacher's attention, of its queries and keys, in float32."""
    window = getattr(lesson.teacher, "window", None)
    if window is not None:
        visible = visible & ~torch.ones_like(visible).tril(-window)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("blhd,bshd->bhls", q.float(), k.float()) * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


class Hedgehog(Recipe):
    name = "hedgehog"
    summary = "linear attention with trained features; rows of attention, then LoRA or all weights"
    config = Config

    def mixer(self, settings: Config, teacher: KinConfig, layer: int) -> dict[str, Any]:
        return {"name": "hedgehog", "feature_dim": settings.feature_dim}

    def stages(self, settings: Config) -> list[Stage]:
        return [
            Transfer("transfer", settings.transfer, row_error, r"feature_map_[qk]\..*"),
            FineTune("finetune", settings.finetune, "" if settings.lora else ".*", settings.lora),
        ]
