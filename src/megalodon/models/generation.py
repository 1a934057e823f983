"""How Transformers' `generate` passes a `State` on in place of the key-value caches it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from megalodon.models.documents import NAMES, ROWS, as_positions, documents_of
from megalodon.models.layers.head import generation_starts
from megalodon.models.output import CACHE, the_state
from megalodon.models.state import State

_NO_PAGES = (
    'generate_batch and cache_implementation="paged" need a cache of pages: this model\'s memory is a state. For many '
    "requests at once use megalodon.inference.engine.Engine or `megalodon serve`; for a batch of prompts, `generate` "
    "with padding"
)


FOR_STOPPING = ("tokenizer", "assistant_tokenizer")
"""What `generate` is given for `stop_strings` and its like, and passes on to every forward pass as well."""


def _no_cache(asked: Any) -> str:
    hint = f"; {_NO_PAGES}" if asked == "paged" else ""
    return f"cache_implementation={asked!r}: the memory is the model's state; leave cache_implementation out{hint}"


class StateGenerationMixin(GenerationMixin):
    """`generate` with prompts in pieces (`prefill_chunk_size`), states given by the user, beams and padding."""

    if TYPE_CHECKING:  # what the class it is mixed into has
        model: Any

        @property
        def device(self) -> torch.device: ...

        def get_output_embeddings(self) -> torch.nn.Module | None: ...

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Transformers' `generate`; caches of its own are refused before it begins.

        Raises:
            ValueError: a `cache_implementation` is asked for.
        """
        config = options.get("generation_config")
        asked = options.get("cache_implementation") or getattr(config, "cache_implementation", None)
        if asked is not None:
            raise ValueError(_no_cache(asked))
        return super().generate(*arguments, **options)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Transformers must not make a cache of its own: the model returns its state."""
        return False

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Transformers' continuous batching pages keys and values of attention; a state has none to page.

        Raises:
            NotImplementedError: always, with what to use instead.
        """
        raise NotImplementedError(_NO_PAGES)

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    # Transformers returns None as well, whatever its annotation says.
    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], mode: Any, batch_size: int, length: int
    ) -> None:
        """Called once by `generate`, after repeating the prompts for beams or samples: give each copy its state."""
        if generation_config.cache_implementation is not None:
            raise ValueError(_no_cache(generation_config.cache_implementation))
        state = the_state(model_kwargs.get(CACHE), None, {})
        self.model.generation_starts()
        if (head := self.get_output_embeddings()) is not None:
            generation_starts(head)
        self._place_documents(model_kwargs, state, getattr(generation_config, "_mask_length", 0))
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if state is not None:
            model_kwargs[CACHE] = state.repeat(copies) if copies > 1 else state
        elif generation_config.use_cache:
            model_kwargs[CACHE] = self.model.empty_state(batch_size * copies)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Positions that merely count on are the state's own; only a user's are passed on."""

    def _place_documents(self, model_kwargs: dict[str, Any], state: State | None, columns: int) -> None:
        """Say what documents a prompt has by `position_ids`: the one name that `generate` cuts and goes on with.

        `columns`: of the whole text, where `generate` has put aside a mask without padding.
        """
        told = {name: model_kwargs[name] for name in NAMES if model_kwargs.get(name) is not None}
        bounds = next((told[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k") if name in told), None)
        rows = {name: told[name] for name in ROWS if name in told}
        if bounds is not None and all(bool((value == value[:1]).all()) for value in rows.values()):
            rows = {name: value[:1] for name, value in rows.items()}  # beams of the one row that bounds are for
        sizes = [value.shape for value in rows.values()] or ([] if bounds is None else [(1, int(bounds[-1]))])
        if not sizes:
            return
        (batch, length), mask, told = sizes[0], model_kwargs.get("attention_mask"), {**told, **rows}
        is_new_part = (columns if mask is None else mask.shape[1]) > length
        seen = state.position if state is not None and is_new_part else None
        documents = documents_of(batch, length, self.device, told, mask, seen)
        model_kwargs["position_ids"] = as_positions(batch, length, self.device, documents, mask, seen)
        for name in told.keys() - {"position_ids"}:
            del model_kwargs[name]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: State | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: State | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` passes to the next forward pass: the columns of the prompt that the state has not read.

        Raises:
            ValueError: a state is given, but not the whole text that it has read the beginning of.
        """
        state = the_state(past_key_values, cache, kwargs)
        for name in FOR_STOPPING:
            kwargs.pop(name, None)
        if is_first_iteration and not (input_ids if inputs_embeds is None else inputs_embeds).shape[1]:
            raise ValueError("input_ids has no token: give a prompt, or no input_ids, which begins with bos_token_id")
        if is_first_iteration and next_sequence_length is not None and state is not None:
            columns = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            next_sequence_length = columns - _columns_read(state, attention_mask)
            if next_sequence_length < 1 <= columns:
                raise ValueError(
                    f"{CACHE} has read {state.get_seq_length()} tokens, input_ids has {columns}: "
                    "give the whole text, or only its new part with an attention_mask [B, read + new] for the whole"
                )
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: state},
            **kwargs,
        )


def _columns_read(state: State, attention_mask: Tensor | None) -> int:
    """How many columns of a padded batch a state has read: it counts the real tokens of each row alone."""
    if attention_mask is None:
        return state.get_seq_length()
    before = attention_mask.cumsum(1) < state.position.to(attention_mask.device)[:, None]
    return int((before.sum(1) + (state.position > 0).to(attention_mask.device)).max())
