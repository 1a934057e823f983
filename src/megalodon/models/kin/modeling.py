"""The kin model as Transformers classes: embedding, blocks, final norm and head.

Padding is taken out before the first block and put back after the last: inside, every row begins with its first real
token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from megalodon.models.generation import MegalodonGenerationMixin
from megalodon.models.kin.block import KinBlock
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers import Mixer
from megalodon.models.kin.state import KinState, check_dimensions, dimensions_of
from megalodon.models.loss import summed_loss
from megalodon.models.output import MegalodonModelOutput, MegalodonOutput, the_state
from megalodon.models.padding import RealTokens
from megalodon.ops.layout import layout_of


class KinPreTrainedModel(PreTrainedModel):
    """What all kin models share: initialisation, loading and saving."""

    config_class = KinConfig
    config: KinConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KinBlock"]  # noqa: RUF012
    _is_stateful = True

    def _initialize_weights(self, module: nn.Module, *_: Any) -> None:
        """As for Transformers' own models: theirs alone have `_init_weights` called for modules that hold no parameter
        themselves, as most mixers, which set those of their parts."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, 0.0, std)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm) and module.weight is not None:
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Mixer):
            module.initialise(std)


class KinModel(KinPreTrainedModel):
    """Token ids -> normalised hidden states, and the state of the sequences."""

    def __init__(self, config: KinConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(KinBlock(config, i) for i in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.model_dim, config.norm_eps)
        self.dimensions = dimensions_of(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> MegalodonModelOutput | tuple[Any, ...]:
        """Run the network; arguments and result are those of `MegalodonModel.forward`."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        state: Any = the_state(past_key_values, cache, kwargs)
        x = self._embed(input_ids, inputs_embeds)
        length = x.shape[1]
        self._check(x, attention_mask, state, segment_ids)
        rows = None
        if attention_mask is not None:
            rows = RealTokens.of(attention_mask[:, -length:] if length else attention_mask)
        if rows is not None:
            x = rows.pack(x)
            segment_ids = None if segment_ids is None else rows.pack(segment_ids)
        layout = layout_of(
            x.shape[0],
            x.shape[1],
            x.device,
            segment_ids=segment_ids,
            lengths=None if rows is None else rows.lengths,
            positions=None if state is None else state.position,
        )
        hidden: list[Tensor] = []
        memories = []
        for i, block in enumerate(self.layers):
            hidden.append(x)
            x, memory = block(x, None if state is None else state.layers[i], layout)
            memories.append(memory)
        x = self.final_norm(x)
        hidden.append(x)
        if rows is not None:
            x, hidden = rows.unpack(x, length), [rows.unpack(h, length) for h in hidden]
        position = torch.from_numpy(layout.end_positions)
        kept: Any = KinState(memories, position, self.dimensions) if use_cache else None
        output = MegalodonModelOutput(x, kept, tuple(hidden) if output_hidden_states else None)
        return output if return_dict is not False else output.to_tuple()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: it must be [B, L]")
        return self.embed_tokens(input_ids)

    def _check(
        self, x: Tensor, attention_mask: Tensor | None, state: KinState | None, segment_ids: Tensor | None
    ) -> None:
        batch, length = x.shape[:2]
        if attention_mask is not None and (
            attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length
        ):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: it must be [{batch}, {length}] "
                "(or longer, with what was read before at its start)"
            )
        if segment_ids is not None and segment_ids.shape != (batch, length):
            raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}: it must be {(batch, length)}")
        if state is None:
            return
        if not isinstance(state, KinState):
            raise ValueError(f"past_key_values is a {type(state).__name__}: it must be a KinState or None")
        check_dimensions(state.dimensions, self.dimensions)
        if self.config.state_kind == "none" and bool(state.position.any()):
            raise ValueError("past_key_values: a mixer of this model cannot be read in pieces: give the whole text")
        if state.batch_size != batch:
            raise ValueError(f"past_key_values has {state.batch_size} rows: input_ids has {batch}")


class KinForCausalLM(KinPreTrainedModel, MegalodonGenerationMixin):
    """The language model: `KinModel` and a linear head without bias; logits in float32."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KinConfig) -> None:
        super().__init__(config)
        self.model = KinModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.model_dim, self.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> MegalodonOutput | tuple[Any, ...]:
        """Predict the next token at every position; arguments and result are those of
        `MegalodonForCausalLM.forward`."""
        state = the_state(past_key_values, cache, kwargs)
        outputs = self.model(
            input_ids,
            attention_mask,
            state,
            inputs_embeds,
            use_cache,
            segment_ids,
            output_hidden_states,
            return_dict=True,
        )
        x = outputs.last_hidden_state
        shift_labels = kwargs.get("shift_labels")
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None and shift_labels.shape != x.shape[:2]:
            raise ValueError(f"labels have shape {tuple(shift_labels.shape)}: they must be {tuple(x.shape[:2])}")
        loss = logits = None
        if return_logits or shift_labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x[:, kept]).float()
        if shift_labels is not None:
            total = summed_loss(self.lm_head, x, shift_labels.to(x.device))
            count = (shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / (count.to(total.device) if isinstance(count, Tensor) else count)
        output = MegalodonOutput(loss, logits, outputs.past_key_values, outputs.hidden_states)
        return output if return_dict is not False else output.to_tuple()


AutoConfig.register("megalodon-kin", KinConfig)
AutoModel.register(KinConfig, KinModel)
AutoModelForCausalLM.register(KinConfig, KinForCausalLM)
