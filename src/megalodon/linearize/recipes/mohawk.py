"""MOHAWK (2408.10189): attention into the discrete Mamba-2 mixer, by its matrix, then its output, then the whole model.

Paper and code differ:

- the paper begins with the convolution as identity and the gate open; the code does neither. Here both are so: what
  goes into the gate is z = 0, and its bias makes silu(b) = 1.
- the code has the first two stages, without an optimiser; the third, cross-entropy against the teacher's distribution,
  is the paper's alone.
- the code's student has a norm of its own before the mixer, which it does not set to the teacher's; here it is the
  teacher's, and moves in the last stage with all else.
- the paper's text is C4, the code's OpenWebText; here it is the corpus. Rates, 80M, 160M and 2.76B tokens, rows of 2048
  and warm-up and decay of a tenth each are the paper's.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megalodon.linearize import losses
from megalodon.linearize.config import LinearizeConfig, StageSection, packed
from megalodon.linearize.recipe import Batchwise, FineTune, Lesson, Recipe, Stage, Transfer
from megalodon.linearize.recipes.hedgehog import seen, softmax_rows
from megalodon.models.kin import KinConfig
from megalodon.models.kin.mixers import Mixer
from megalodon.models.kin.mixers.phi_mamba import PhiMamba
from megalodon.models.kin.mixers.projected import Projected
from megalodon.training.data_section import DataSection
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.schedule import ScheduleConfig

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)
SCHEDULE = ScheduleConfig(kind="warmup-stable-decay")


class Config(LinearizeConfig):
    """state_size: N, columns of the mixer's B and C. warmup: share of each stage's steps, unless a stage's schedule
    has warmup_steps."""

    data: DataSection = packed(8, 2048)
    state_size: int = Field(default=64, ge=1)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    matrix: StageSection = StageSection(tokens=80_000_000, optimizer=OPTIMIZER, schedule=SCHEDULE)
    hidden: StageSection = StageSection(tokens=160_000_000, optimizer=OPTIMIZER, schedule=SCHEDULE)
    finetune: StageSection = StageSection(tokens=2_760_000_000, optimizer=OPTIMIZER, schedule=SCHEDULE)


def warmed(section: StageSection, data: DataSection, share: float) -> StageSection:
    """A stage that warms up for a share of its steps, where it has no warm-up of its own."""
    if section.schedule.warmup_steps:
        return section
    schedule = section.schedule.model_copy(update={"warmup_steps": int(share * section.steps(data))})
    return section.model_copy(update={"schedule": schedule})


def matrix_error(lesson: Lesson) -> Tensor:
    """How far the student's mixing matrix is from the teacher's attention."""
    with torch.no_grad():
        q, k, _ = lesson.teacher.queries_keys_values(lesson.x, lesson.layout, rotated=True)
        wanted = softmax_rows(lesson, q, k, seen(lesson))
    mixing = lesson.student.mixing_matrix(lesson.x, lesson.layout)
    return losses.matrix_distance(mixing, wanted)


def hidden_error(lesson: Lesson) -> Tensor:
    """How far the student's output is from the teacher's, after their output projections."""
    return losses.hidden_distance(lesson.student(lesson.x, None, lesson.layout)[0], lesson.output)


def likeness(both: Batchwise) -> Tensor:
    """Cross-entropy of the student's distribution against the teacher's."""
    return losses.soft_cross_entropy(both.student.logits, both.teacher.logits, both.labels)


class Mohawk(Recipe):
    name = "mohawk"
    summary = "Mamba-2 with a state for each head; matrices, outputs, then distributions"
    config = Config

    def mixer(self, settings: Config, teacher: KinConfig, layer: int) -> dict[str, Any]:
        return {"name": "phi_mamba", "state_size": settings.state_size}

    def problems(self, settings: Config, teacher: KinConfig) -> list[str]:
        if teacher.model_dim % teacher.num_heads:
            return [f"the teacher's {teacher.num_heads} heads do not divide its width, {teacher.model_dim}"]
        return []

    def stages(self, settings: Config) -> list[Stage]:
        matrix, hidden, finetune = (
            warmed(section, settings.data, settings.warmup)
            for section in (settings.matrix, settings.hidden, settings.finetune)
        )
        return [
            Transfer("matrix", matrix, matrix_error, r"in_proj\..*|conv1d\..*|D"),
            Transfer("hidden", hidden, hidden_error, ".*"),
            FineTune("finetune", finetune, ".*", objective=likeness),
        ]

    @torch.no_grad()
    def start(self, student: Mixer, teacher: Projected) -> None:
        """The convolution and the gate's bias begin as the mixer does; nothing goes into the gate."""
        assert isinstance(student, PhiMamba)
        student.in_proj.weight[student.channels : student.channels + student.inner] = 0
