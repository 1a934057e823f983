"""The network; reads like the specification, top to bottom. No word of devices, ranks or kernels."""

from megalodon.models.causal_lm import MegalodonForCausalLM, MegalodonModel
from megalodon.models.megalodon.config import PRESETS, MegalodonConfig
from megalodon.models.state import MegalodonState

__all__ = ["PRESETS", "MegalodonConfig", "MegalodonForCausalLM", "MegalodonModel", "MegalodonState"]
