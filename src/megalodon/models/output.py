"""What the model returns: Transformers' outputs, with the state under either of the names that Transformers gives it.

Transformers calls what a model remembers `past_key_values` up to version 5.23, and `cache` from 5.24 on. Here both
names are good with every version, as arguments and in outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from megalodon.models.state import State

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The name in the installed version: that of the field of outputs, and of the argument in `generate`."""


class _BothNames:
    """The other name, as a property. Type checkers see it beside the field of a version that they do not check with,
    hence their silence below."""

    if CACHE == "cache":

        @property
        def past_key_values(self) -> State | None:
            return self.cache
    else:

        @property
        def cache(self) -> State | None:
            return self.past_key_values


@dataclass
class ModelOutput(_BothNames, BaseModelOutputWithPast):  # type: ignore[misc]
    """last_hidden_state [B, L, D], past_key_values (a `State` or None) and hidden_states."""


@dataclass
class LanguageModelOutput(_BothNames, CausalLMOutputWithPast):  # type: ignore[misc]
    """loss, logits float32 [B, L, vocab], past_key_values (a `State` or None) and hidden_states."""


def the_state(past_key_values: State | None, cache: State | None, others: Mapping[str, object]) -> State | None:
    """The one that is given.

    Raises:
        ValueError: both are, or among the call's other arguments is a state, which would be forgotten in silence.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("give past_key_values or cache, and not both: they are two names for the state")
    for name, value in others.items():
        if isinstance(value, State):
            raise ValueError(f"{name} is a {type(value).__name__}: give it as past_key_values or cache")
    state = cache if past_key_values is None else past_key_values
    return state
