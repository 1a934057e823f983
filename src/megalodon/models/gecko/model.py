"""Gecko as Transformers classes: the shell with Gecko's blocks, final norm, state and single-token step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megalodon.models.causal_lm import CausalLM, StatefulModel
from megalodon.models.gecko.block import GeckoBlock, norm_over_time
from megalodon.models.gecko.config import GeckoConfig
from megalodon.models.gecko.state import GeckoState
from megalodon.models.gecko.token_step import TokenStep, generation_starts
from megalodon.models.layers.timestep_decay_norm import TimestepDecayNorm
from megalodon.models.layers.window_attention import Turns
from megalodon.models.pretrained import StatefulPreTrainedModel
from megalodon.models.state import State
from megalodon.ops.layout import Layout


class GeckoPreTrainedModel(StatefulPreTrainedModel):
    """What both Gecko classes share."""

    config_class = GeckoConfig
    config: GeckoConfig
    _no_split_modules = ["GeckoBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["cema"]  # noqa: RUF012


class GeckoModel(GeckoPreTrainedModel, StatefulModel):
    """Token ids -> normalised hidden states, and the state of the sequences (`GeckoState`)."""

    state_class = GeckoState

    def make_block(self, layer: int) -> GeckoBlock:
        return GeckoBlock(self.config, layer)

    def make_final_norm(self) -> TimestepDecayNorm:
        return norm_over_time(self.config)

    @staticmethod
    def layer_arguments(config: GeckoConfig, layout: Layout) -> tuple[Any, ...]:
        """The rotations of each token."""
        return (Turns.of(config, layout.chunk_positions),)

    def single_token(self, x: Tensor, state: State | None) -> TokenStep | None:
        assert state is None or isinstance(state, GeckoState)
        return TokenStep.of(self, x, state)

    def generation_starts(self) -> None:
        generation_starts(self)

    @staticmethod
    def segment_starts(config: GeckoConfig, input_ids: Tensor | None) -> Tensor | None:
        if not config.multi_segments:
            return None
        if config.bos_token_id is None:
            raise ValueError("multi_segments=True needs bos_token_id: segments begin at BOS tokens")
        if input_ids is None:
            raise ValueError("inputs_embeds do not tell BOS tokens, which multi_segments needs: give input_ids")
        return input_ids.eq(config.bos_token_id)


class GeckoForCausalLM(GeckoPreTrainedModel, CausalLM):
    """The language model: `GeckoModel` and a linear head without bias; logits in float32."""

    model_class = GeckoModel
