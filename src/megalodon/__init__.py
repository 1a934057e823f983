"""Megalodon language models with unlimited context (arXiv 2404.08801), on PyTorch. The public names, nothing else.

Importing it registers the model with Transformers, so that `AutoModelForCausalLM` finds it.
"""

from megalodon.models import PRESETS, MegalodonConfig, MegalodonForCausalLM, MegalodonModel, MegalodonState
from megalodon.models.kin import KinConfig, KinForCausalLM, KinModel, KinState
from megalodon.models.megabyte import MegabyteConfig, MegabyteForCausalLM, MegabyteModel, MegabyteState

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "KinConfig",
    "KinForCausalLM",
    "KinModel",
    "KinState",
    "MegabyteConfig",
    "MegabyteForCausalLM",
    "MegabyteModel",
    "MegabyteState",
    "MegalodonConfig",
    "MegalodonForCausalLM",
    "MegalodonModel",
    "MegalodonState",
    "__version__",
]
