"""The network; reads like the specification, top to bottom. No word of devices, ranks or kernels."""

from megalodon.model.config import PRESETS, MegalodonConfig
from megalodon.model.modeling import MegalodonForCausalLM, MegalodonModel
from megalodon.model.state import MegalodonState

__all__ = ["PRESETS", "MegalodonConfig", "MegalodonForCausalLM", "MegalodonModel", "MegalodonState"]
