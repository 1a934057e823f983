"""Megalodon as Transformers classes: the shell with Megalodon's blocks, final norm, state and single-token step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megalodon import ops
from megalodon.models.causal_lm import CausalLM, StatefulModel
from megalodon.models.layers.timestep_norm import TimestepNorm
from megalodon.models.megalodon.block import MegalodonBlock
from megalodon.models.megalodon.config import MegalodonConfig
from megalodon.models.megalodon.slots import MegalodonSlots
from megalodon.models.megalodon.state import MegalodonState
from megalodon.models.megalodon.static_step import StaticStep
from megalodon.models.megalodon.token_step import TokenStep, generation_starts
from megalodon.models.pretrained import StatefulPreTrainedModel
from megalodon.models.state import State
from megalodon.ops.layout import Layout


class MegalodonPreTrainedModel(StatefulPreTrainedModel):
    """What both Megalodon classes share."""

    config_class = MegalodonConfig
    config: MegalodonConfig
    _no_split_modules = ["MegalodonBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["cema"]  # noqa: RUF012


class MegalodonModel(MegalodonPreTrainedModel, StatefulModel):
    """Token ids -> normalised hidden states, and the state of the sequences (`MegalodonState`)."""

    state_class = MegalodonState

    def make_block(self, layer: int) -> MegalodonBlock:
        return MegalodonBlock(self.config, layer)

    def make_final_norm(self) -> TimestepNorm:
        config = self.config
        return TimestepNorm(config.model_dim, config.norm_num_groups, config.norm_prior_count, config.norm_eps)

    @staticmethod
    def layer_arguments(config: MegalodonConfig, layout: Layout) -> tuple[Any, ...]:
        """The rotations of each token."""
        return (ops.rotations(layout.chunk_positions, config.head_dim, config.rope_base),)

    def single_token(self, x: Tensor, state: State | None) -> TokenStep | None:
        assert state is None or isinstance(state, MegalodonState)
        return TokenStep.of(self, x, state)

    def generation_starts(self) -> None:
        generation_starts(self)


class MegalodonForCausalLM(MegalodonPreTrainedModel, CausalLM):
    """The language model: `MegalodonModel` and a linear head without bias; logits in float32."""

    model_class = MegalodonModel
    slots_class = MegalodonSlots
    has_int8 = True
    static_step_class = StaticStep
