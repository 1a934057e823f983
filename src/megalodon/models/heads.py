"""Heads that label sequences and tokens, for every architecture: Transformers' own heads on our networks.

A sequence's label is read at its last token, which has read all of it; reward models are such heads with one label.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from megalodon.models.causal_lm import StatefulModel
from megalodon.models.pretrained import StatefulPreTrainedModel

HEADS = {
    "ForSequenceClassification": GenericForSequenceClassification,
    "ForTokenClassification": GenericForTokenClassification,
}
"""What a head's class is called after its architecture, and what it is."""


def heads_of(model: type[StatefulModel]) -> dict[str, type[StatefulPreTrainedModel]]:
    """The head classes of an architecture, by the ends of their names.

    Args:
        model: its network without a head, of a class that ends in "Model".
    """
    shared = next(base for base in model.__bases__ if issubclass(base, StatefulPreTrainedModel))
    stem = model.__name__.removesuffix("Model")
    found = {}
    for ending, generic in HEADS.items():
        body: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": f"`{model.__name__}` and a linear layer; see `transformers.modeling_layers.{generic.__name__}`.",
            "accepts_loss_kwargs": False,  # their losses are means, which the Trainer divides itself
        }
        found[ending] = globals()[stem + ending] = type(stem + ending, (generic, shared), body)
    return found
