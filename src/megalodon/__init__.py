"""Megalodon (arXiv 2404.08801), its successor and its kin, with unlimited context, on PyTorch. The public names alone.

Importing it registers the model with Transformers, so that `AutoModelForCausalLM` finds it.
"""

from megalodon.models import (
    PRESETS,
    GeckoConfig,
    GeckoForCausalLM,
    GeckoModel,
    GeckoState,
    MegalodonConfig,
    MegalodonForCausalLM,
    MegalodonModel,
    MegalodonState,
)
from megalodon.models.kin import KinConfig, KinForCausalLM, KinModel, KinState
from megalodon.models.megabyte import MegabyteConfig, MegabyteForCausalLM, MegabyteModel, MegabyteState

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "GeckoConfig",
    "GeckoForCausalLM",
    "GeckoModel",
    "GeckoState",
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
