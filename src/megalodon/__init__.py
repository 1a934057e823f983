"""Megalodon (arXiv 2404.08801), its successor and its kin, with unlimited context, on PyTorch. The public names alone.

Importing it registers the models with Transformers, so that `AutoModelForCausalLM` finds them: at once if Transformers
is there already, or else as soon as anything imports it. Until then, or until a name is asked for, neither PyTorch nor
Transformers is loaded, so that `megalodon train --help` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megalodon.importing import after_import

if TYPE_CHECKING:
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

_ROOMS = ("models", "models.kin", "models.megabyte")
"""Where the names come from."""
_PARTS = {
    *("comparison", "convert", "data", "evaluation", "files", "inference", "linearize", "models", "ops", "parallel"),
    *("serving", "training"),
}
"""Modules that are there without an import of their own, such as `megalodon.ops`."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        for room in _ROOMS:
            module = importlib.import_module(f"megalodon.{room}")
            if hasattr(module, name):
                return globals().setdefault(name, getattr(module, name))
    if name in _PARTS:
        return importlib.import_module(f"megalodon.{name}")
    raise AttributeError(f"module 'megalodon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})


after_import("transformers", "megalodon.models")  # which registers them
