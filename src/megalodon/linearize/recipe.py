"""What a recipe is: the mixer that takes attention's place, how it begins, and the stages in which it learns.

To write one: a file in `recipes/` with a config (`LinearizeConfig` and the recipe's sections) and a `Recipe`, and a
line in `recipes/__init__.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalodon.linearize.config import LinearizeConfig, LoraSection, StageSection
from megalodon.models.kin import KinConfig
from megalodon.models.kin.mixers import Mixer, mixer_class
from megalodon.models.kin.mixers.projected import Projected
from megalodon.ops.layout import Layout


class Lesson:
    """What a layer's new mixer learns from in a step: the teacher's input to the layer, and what it makes of it.

    Attributes:
        layer: its number.
        x: [B, L, D]; the normalised input of the teacher's mixer, without gradients.
        layout: where the tokens stand.
        teacher: the attention that is replaced. student: the mixer that takes its place.
        heads: [B, L, H, d]; what the teacher's heads give, before the output projection, without gradients.
    """

    def __init__(
        self, layer: int, x: Tensor, layout: Layout, teacher: Projected, student: Mixer, heads: Tensor
    ) -> None:
        self.layer, self.x, self.layout = layer, x, layout
        self.teacher, self.student, self.heads = teacher, student, heads

    @cached_property
    def output(self) -> Tensor:
        """[B, L, D]: what the teacher's mixer gives, after the output projection, without gradients."""
        with torch.no_grad():
            return self.teacher.o_proj(self.heads.flatten(-2))


Objective = Callable[[Lesson], Tensor]
"""The loss of a layer: a scalar, whose gradients reach the student's mixer alone."""


@dataclass(frozen=True)
class Transfer:
    """A stage in which every replaced layer learns from the teacher's, by itself.

    Attributes:
        name: of its section and its run folder.
        section: how long, and how its weights move.
        objective: the loss of a layer.
        trainable: matches the names of those parameters of a mixer that move (`re.fullmatch`).
    """

    name: str
    section: StageSection
    objective: Objective
    trainable: str


@dataclass(frozen=True)
class Batchwise:
    """What the whole models made of a step's rows, for a stage's loss beside or in place of the next token's.

    Attributes:
        student, teacher: what `KinForCausalLM` returned, with logits and hidden states.
        labels: int64 [B, L], already shifted; -100 where there is none.
    """

    student: Any
    teacher: Any
    labels: Tensor


@dataclass(frozen=True)
class FineTune:
    """A stage that trains the whole model.

    Attributes:
        name, section: as of `Transfer`.
        trainable: matches the names of parameters of the model that move; with adapters those move too.
        lora: adapters, merged into the weights at the end; None: none.
        objective: the mean loss over a batch's targets, of what student and teacher gave; None: of the next token.
    """

    name: str
    section: StageSection
    trainable: str
    lora: LoraSection | None = None
    objective: Callable[[Batchwise], Tensor] | None = None


Stage = Transfer | FineTune


class Recipe:
    """One way to replace attention.

    Class attributes:
        name: as users write it. summary: a line for them. config: its settings.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    config: ClassVar[type[LinearizeConfig]]

    def mixer(self, settings: Any, teacher: KinConfig, layer: int) -> dict[str, Any]:
        """The mixer of a replaced layer, {"name": ..., and its parameters}; what the teacher's projections have
        (biases, norms of heads) is added."""
        raise NotImplementedError

    def stages(self, settings: Any) -> list[Stage]:
        """What is done, in order."""
        raise NotImplementedError

    def problems(self, settings: Any, teacher: KinConfig) -> list[str]:
        """What speaks against this teacher, one sentence each; empty when all is well."""
        return []

    @torch.no_grad()
    def start(self, student: Mixer, teacher: Projected) -> None:
        """Give a new mixer what it takes from the teacher's: here all parameters of the same name, without copies."""
        theirs = dict(teacher.named_parameters())
        own = dict(student.named_parameters())
        shared = {name: theirs[name] for name in own if name in theirs and theirs[name].shape == own[name].shape}
        student.load_state_dict(shared, strict=False, assign=True)

    def student_config(self, settings: Any, teacher: KinConfig, kept: list[int]) -> KinConfig:
        """The config of the model to be made, in which the layers in `kept` stay as they are."""
        mixers: list[str | dict[str, Any]] = []
        for layer in range(teacher.num_layers):
            name, parameters = teacher.mixer_of(layer)
            own = {"name": name, **parameters.model_dump(exclude_defaults=True)}
            mixers.append(own if layer in kept else self._inherited(self.mixer(settings, teacher, layer), own))
        return KinConfig(**teacher_fields(teacher), mixers=mixers)

    @staticmethod
    def _inherited(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        own = mixer_class(new["name"]).Parameters.model_fields
        projections = [name for name in ("bias", "out_bias", "head_norm") if name in own]
        return {**{name: old[name] for name in projections if name in old}, **new}


def teacher_fields(teacher: KinConfig) -> dict[str, Any]:
    """A teacher's fields but for its mixers."""
    left = ("mixers", "mixer_parameters")
    return {name: getattr(teacher, name) for name in KinConfig.architecture_fields() if name not in left}


def beyond_reach(settings: LinearizeConfig, key: str, reach: int) -> list[str]:
    """What speaks against rows of which no token sees more than its window of `reach`, which `key` sets."""
    length = settings.data.sequence_length
    if length > reach:
        return []
    return [
        f"data.sequence_length: rows of {length} hold nothing beyond the {reach} tokens that a window shows, so that "
        f"there is nothing to learn: give longer rows, or less {key}"
    ]


def moving(names: list[str], pattern: str) -> list[str]:
    """The names that a pattern matches.

    Raises:
        ValueError: it matches none.
    """
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise ValueError(f"no parameter is called {pattern}: there are {', '.join(names)}")
    return found
