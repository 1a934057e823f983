"""Keywords of a forward pass that change nothing, each with its reason; all others that are unknown are refused.

Libraries pass keywords to every model alike. One that was swallowed could have meant something, so a forward pass takes
only what it knows, and what is listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon.models.documents import NAMES


class UnknownKeyword(TypeError, ValueError):
    """There is no such argument: a TypeError, as Python raises, and a ValueError, as all that the model refuses."""


class Neutral(NamedTuple):
    """A keyword that changes nothing.

    Attributes:
        reason: why, and who passes it.
        holds: whether that is so for this value.
        instead: what to do where it is not so.
    """

    reason: str
    holds: Callable[[Any], bool]
    instead: str


def _off(value: Any) -> bool:
    return value is None or value is False


def _any(value: Any) -> bool:
    return True


def _zeros(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and not bool(torch.any(value != 0)))


NEUTRAL: Mapping[str, Neutral] = {
    "output_attentions": Neutral(
        "attention weights are never all there: PEFT and pipelines pass False",
        _off,
        "no table of weights over the whole text exists in this model; for what a layer gives and takes, set "
        "output_hidden_states=True or register a forward hook on it",
    ),
    "output_router_logits": Neutral(
        "there are no experts: TRL passes True only where a config says that there are",
        _off,
        "this model has no experts and no router",
    ),
    "is_causal": Neutral(
        "the model is causal: Transformers passes it to choose a mask",
        lambda value: value is None or value is True,
        "this model reads from left to right only",
    ),
    "num_items_in_batch": Neutral(
        "a network without a language model's head has no loss over tokens: the Trainer passes it to every model",
        _any,
        "",
    ),
    "cache_position": Neutral(
        "the state knows how much it has read: `generate` passes it before Transformers 5.10", _any, ""
    ),
    "token_type_ids": Neutral(
        "all tokens are of one type: tokenizers and PEFT's prompt methods pass zeros",
        _zeros,
        "this model has no token types; documents are told by segment_ids",
    ),
    "mm_token_type_ids": Neutral(
        "all tokens are text: processors, and TRL with them, pass zeros", _zeros, "this model reads text only"
    ),
}
"""What Transformers, TRL and PEFT pass and what changes nothing, by name."""


def refuse_unknown(forward: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise unless every keyword in `given`, which `forward` has no use for, changes nothing.

    Raises:
        UnknownKeyword: there is no such keyword; the message says which one is near.
        ValueError: its value asks for what the model does not do.
    """
    for name, value in given.items():
        neutral = NEUTRAL.get(name)
        if neutral is None:
            known = [*signature(forward).parameters, *NAMES, *NEUTRAL]
            near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, known, 1))
            raise UnknownKeyword(f"forward has no argument {name}: it would change nothing{near}")
        if not neutral.holds(value):
            shown = "" if isinstance(value, Tensor) else f"={value!r}"
            raise ValueError(f"{name}{shown}: {neutral.instead}")
