"""The networks: one folder an architecture, one list of them; what all share stands beside the folders.

Reads like the specification, top to bottom. No word of devices, ranks or kernels. The rooms above work with any
architecture of the list: by its config (`Config`), its language model (`CausalLM`) and its state (`State`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from megalodon.models.causal_lm import CausalLM, StatefulModel
from megalodon.models.config import Config
from megalodon.models.folder import auto_map_of
from megalodon.models.gecko.config import GeckoConfig
from megalodon.models.gecko.model import GeckoForCausalLM, GeckoModel
from megalodon.models.gecko.state import GeckoState
from megalodon.models.heads import heads_of
from megalodon.models.kin import KinConfig, KinForCausalLM, KinModel
from megalodon.models.megabyte import MegabyteConfig, MegabyteForCausalLM, MegabyteModel
from megalodon.models.megalodon.config import PRESETS, MegalodonConfig
from megalodon.models.megalodon.model import MegalodonForCausalLM, MegalodonModel
from megalodon.models.megalodon.state import MegalodonState
from megalodon.models.peers import PeerConfig, PeerForCausalLM, PeerModel, PeerState
from megalodon.models.pretrained import StatefulPreTrainedModel
from megalodon.models.state import State


@dataclass(frozen=True)
class Trainable:
    """What can be trained and run: its config, the network without a head, and the language model."""

    config: type[Config]
    model: Any
    causal_lm: Any


@dataclass(frozen=True)
class Architecture(Trainable):
    """An architecture of ours.

    Attributes:
        heads: other heads, by the ends of their classes' names (`megalodon.models.heads`).
    """

    model: type[StatefulModel]
    causal_lm: type[CausalLM]
    heads: dict[str, type[StatefulPreTrainedModel]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", heads_of(self.model))

    def auto_classes(self) -> dict[Any, type]:
        """Its classes, by those of Transformers' that find them."""
        return {
            AutoModel: self.model,
            AutoModelForCausalLM: self.causal_lm,
            AutoModelForSequenceClassification: self.heads["ForSequenceClassification"],
            AutoModelForTokenClassification: self.heads["ForTokenClassification"],
        }


ARCHITECTURES: dict[str, Architecture] = {
    "megalodon": Architecture(MegalodonConfig, MegalodonModel, MegalodonForCausalLM),
    "megalodon-kin": Architecture(KinConfig, KinModel, KinForCausalLM),
    "gecko": Architecture(GeckoConfig, GeckoModel, GeckoForCausalLM),
    "megalodon-megabyte": Architecture(MegabyteConfig, MegabyteModel, MegabyteForCausalLM),
}
"""Every architecture by its `model_type`. The first is the default where none is named."""

TRAINABLE: dict[str, Trainable] = {
    **ARCHITECTURES,
    PeerConfig.model_type: Trainable(PeerConfig, PeerModel, PeerForCausalLM),
}
"""What `model.architecture` may name: ours, and any causal language model of Transformers (`models.peers`)."""

_TABLES = {
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
"""Transformers' names of classes, which its Trainer and pipelines look up: with label smoothing, the Trainer shifts
labels for names of language models alone."""


def _register(name: str, architecture: Architecture) -> None:
    """Make an architecture known to Transformers."""
    classes = architecture.auto_classes()
    AutoConfig.register(name, architecture.config)
    for auto, kind in classes.items():
        auto.register(architecture.config, kind)
        if auto in _TABLES:
            _TABLES[auto][name] = kind.__name__
    named = {auto.__name__: kind for auto, kind in classes.items()}
    architecture.config.auto_map = auto_map_of(AutoConfig=architecture.config, **named)


for _name, _architecture in ARCHITECTURES.items():
    _register(_name, _architecture)


def auto_classes_by_name() -> dict[str, type]:
    """Every class that a model folder may name."""
    kinds = [kind for each in ARCHITECTURES.values() for kind in (each.config, *each.auto_classes().values())]
    return {kind.__name__: kind for kind in kinds}


def architecture(name: str) -> Trainable:
    """The architecture of this name, or "transformers".

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in TRAINABLE:
        near = get_close_matches(str(name), TRAINABLE, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TRAINABLE)}"
        raise ValueError(f"no architecture {name!r}; {hint}")
    return TRAINABLE[name]


def all_presets() -> dict[str, type[Config]]:
    """The config class of every published size, by the size's name."""
    return {name: kind.config for kind in ARCHITECTURES.values() for name in kind.config.presets}


def load_config(folder: str | Path) -> Config:
    """The config in a model folder, of whatever architecture.

    Raises:
        FileNotFoundError: there is no config.json. ValueError: its architecture is not one of ours, or it is not
            possible.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not a model folder")
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind not in ARCHITECTURES and PeerConfig.is_kind(kind):
        return PeerConfig.from_pretrained(folder)
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder} holds a model of type {kind!r}: it must be one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind].config.from_pretrained(folder)


def build_model(config: Config) -> CausalLM:
    """A new language model of this config, drawn from the global generator."""
    model: CausalLM = architecture(config.model_type).causal_lm(config)
    return model


__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "TRAINABLE",
    "Architecture",
    "CausalLM",
    "Config",
    "GeckoConfig",
    "GeckoForCausalLM",
    "GeckoModel",
    "GeckoState",
    "KinConfig",
    "KinForCausalLM",
    "KinModel",
    "MegabyteConfig",
    "MegabyteForCausalLM",
    "MegabyteModel",
    "MegalodonConfig",
    "MegalodonForCausalLM",
    "MegalodonModel",
    "MegalodonState",
    "PeerConfig",
    "PeerForCausalLM",
    "PeerModel",
    "PeerState",
    "State",
    "StatefulModel",
    "Trainable",
    "all_presets",
    "architecture",
    "build_model",
    "load_config",
]
