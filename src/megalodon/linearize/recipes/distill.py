"""The distillation study (2504.14366v2): a student with other mixers learns the next token and the teacher's logits.

The study adds one thing at a time to that: hidden states that align (it helps most reliably), projections that begin as
the teacher's (it helps the start), and token matrices that mix alike (it helps little at its size). Each is a switch
here; the first two are on. Its students that recover most are gated; its third version, another paper under the number,
adds that only gated delta rules keep long retrieval: `student` is one of these. There is no published code: weights of
the losses, and that matrices are fitted in a stage before, layer by layer, are ours.

What these mixers have no place for is lost at the start: biases and norms of heads of the teacher's projections, and
the turning of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from megalodon.linearize import losses
from megalodon.linearize.config import LinearizeConfig, StageSection, packed
from megalodon.linearize.recipe import Batchwise, FineTune, Recipe, Stage, Transfer
from megalodon.linearize.recipes.mohawk import matrix_error
from megalodon.models.kin import KinConfig
from megalodon.models.kin.mixers import Mixer
from megalodon.models.kin.mixers.gated_delta import GatedDelta
from megalodon.models.kin.mixers.projected import Projected
from megalodon.training.data_section import DataSection
from megalodon.training.optimizer import OptimizerConfig
from megalodon.training.schedule import ScheduleConfig

OPTIMIZER = OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)
SCHEDULE = ScheduleConfig(kind="cosine", end_ratio=0.1)


class Likeness(LinearizeConfig):
    """next_token, logits and hidden: weights of the whole model's losses."""

    next_token: float = Field(default=1.0, ge=0, description="weight of the next token's cross-entropy")
    logits: float = Field(default=1.0, ge=0, description="weight of the divergence from the teacher's distribution")
    temperature: float = Field(default=1.0, gt=0, description="of both distributions")
    hidden: float = Field(default=1.0, ge=0, description="weight of the distance of hidden states; 0: they are free")

    def problems(self) -> list[str]:
        found = super().problems()
        if not (self.next_token or self.logits or self.hidden):
            found.append("next_token, logits, hidden: one of the weights must be more than 0")
        return found


class Config(Likeness):
    """student: the mixer. copy_projections: begin with the teacher's. mix: fit token matrices before."""

    data: DataSection = packed(8, 2048)
    student: Literal["gla", "gated_delta"] = "gla"
    copy_projections: bool = Field(default=True, description="of queries, keys, values and outputs")
    mix: bool = Field(default=False, description="a stage before, in which token matrices are fitted")
    matrix: StageSection = StageSection(tokens=80_000_000, optimizer=OPTIMIZER, schedule=SCHEDULE)
    finetune: StageSection = StageSection(tokens=3_000_000_000, optimizer=OPTIMIZER, schedule=SCHEDULE)


def objective(settings: Likeness) -> Callable[[Batchwise], Tensor]:
    """The weighted sum of what is asked for."""

    def loss(both: Batchwise) -> Tensor:
        student, teacher, labels = both.student, both.teacher, both.labels
        total = student.logits.new_zeros(())
        if settings.next_token:
            total = total + settings.next_token * losses.next_token(student.logits, labels)
        if settings.logits:
            apart = losses.divergence(student.logits, teacher.logits, labels, settings.temperature)
            total = total + settings.logits * apart
        if settings.hidden:  # without the embedding, which both begin with
            total = total + settings.hidden * losses.alignment(
                student.hidden_states[1:], teacher.hidden_states[1:], labels
            )
        return total

    return loss


class Distill(Recipe):
    name = "distill"
    summary = "gated linear attention or a gated delta rule; logits and hidden states of the whole model"
    config = Config
    copies = True

    def student_config(self, settings: Config, teacher: KinConfig, kept: list[int]) -> KinConfig:
        self.copies = settings.copy_projections  # for `start`, which is told of two mixers alone
        return super().student_config(settings, teacher, kept)

    def mixer(self, settings: Config, teacher: KinConfig, layer: int) -> dict[str, Any]:
        if settings.student == "gated_delta":
            return {"name": "gated_delta", "key_dim": teacher.head_size, "value_dim": teacher.head_size}
        share = teacher.num_heads * teacher.head_size / teacher.model_dim
        return {"name": "gla", "expand_k": share, "expand_v": share}

    def stages(self, settings: Config) -> list[Stage]:
        fitted = r"(q|k|qkv|decay|beta)_proj\..*|decay_.*|conv_weight"
        first: list[Stage] = [Transfer("matrix", settings.matrix, matrix_error, fitted)] if settings.mix else []
        return [*first, FineTune("finetune", settings.finetune, ".*", objective=objective(settings))]

    @torch.no_grad()
    def start(self, student: Mixer, teacher: Projected) -> None:
        """With copies: the teacher's projections; keys and values of groups are repeated where heads have their own,
        and a convolution before them begins as identity."""
        if not self.copies:
            return
        super().start(student, teacher)
        if isinstance(student, GatedDelta):
            repeats = student.num_heads // teacher.num_groups
            q, k, v = (getattr(teacher, f"{name}_proj").weight for name in "qkv")
            k, v = (
                x.unflatten(0, (teacher.num_groups, -1)).repeat_interleave(repeats, 0).flatten(0, 1) for x in (k, v)
            )
            student.qkv_proj.weight.copy_(torch.cat([q, k, v]))
            student.conv_weight.zero_()
            student.conv_weight[:, -1] = 1
