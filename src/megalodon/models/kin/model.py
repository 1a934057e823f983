"""The kin model as Transformers classes: the shell with the kin's blocks, final norm and state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon.models.causal_lm import CausalLM, StatefulModel
from megalodon.models.kin.block import FinalLayerNorm, FinalNorm, KinBlock
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers import Mixer, mixer_class
from megalodon.models.kin.state import KinState
from megalodon.models.kin.token_step import TokenStep, generation_starts
from megalodon.models.pretrained import StatefulPreTrainedModel
from megalodon.models.state import State


class KinPreTrainedModel(StatefulPreTrainedModel):
    """What all kin models share."""

    config_class = KinConfig
    config: KinConfig
    _no_split_modules = ["KinBlock"]  # noqa: RUF012

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        """As for Transformers' own models: theirs alone have `_init_weights` called for modules that hold no parameter
        themselves, as most mixers, which set those of their parts."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialise(module, self.config.init_std):
            super()._init_weights(module)


@torch.no_grad()
def initialise(module: nn.Module, std: float) -> bool:
    """Give a module's own parameters the values that a new model has; False where that is not known here."""
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, 0.0, std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, 0.0, std)
    elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
        if module.weight is not None:
            init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, Mixer):
        module.initialise(std)
    else:
        return False
    return True


def new_mixer(config: KinConfig, layer: int) -> Mixer:
    """The mixer of a layer as it is in a new model, drawn from the global generator."""
    name, parameters = config.mixer_of(layer)
    mixer = mixer_class(name)(config, layer, parameters)
    for module in mixer.modules():
        if module is not mixer:
            initialise(module, config.init_std)
    initialise(mixer, config.init_std)
    return mixer


class KinModel(KinPreTrainedModel, StatefulModel):
    """Token ids -> normalised hidden states, and the state of the sequences (`KinState`)."""

    state_class = KinState

    def __init__(self, config: KinConfig) -> None:
        super().__init__(config)
        self.state_kind = config.state_kind

    def make_block(self, layer: int) -> KinBlock:
        return KinBlock(self.config, layer)

    def make_final_norm(self) -> FinalNorm | FinalLayerNorm:
        kind = FinalNorm if self.config.norm == "rms" else FinalLayerNorm
        return kind(self.config.model_dim, self.config.norm_eps)

    def single_token(self, x: Tensor, state: State | None) -> TokenStep | None:
        assert state is None or isinstance(state, KinState)
        return TokenStep.of(self, x, state)

    def generation_starts(self) -> None:
        generation_starts(self)

    @property
    def reads_in_pieces(self) -> bool:
        """Only where memories are constant: a growing one would be copied for each piece."""
        return self.state_kind == "constant" and not self.config.two_way

    def _check(self, x: Tensor, attention_mask: Tensor | None, state: Any, segment_ids: Tensor | None) -> None:
        super()._check(x, attention_mask, state, segment_ids)
        if state is not None and self.state_kind == "none" and bool(state.position.any()):
            raise ValueError("past_key_values: a mixer of this model cannot be read in pieces: give the whole text")


class KinForCausalLM(KinPreTrainedModel, CausalLM):
    """The language model: `KinModel` and a linear head; logits in float32."""

    model_class = KinModel
