"""What a source distribution of Transformers leaves out of `tests/`, as empty shells so that the rest imports.

A distribution carries the files `tests/test_*.py` and no other; a checkout carries all. A shell brings no test:
mixins are empty classes, and a helper that the tests call skips them. `MISSING` names the files, for the run's summary.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

# The config test sets these and reads them back; every value differs from the config's default.
_COMMON_KWARGS: dict[str, Any] = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["Any"],
    "id2label": {0: "only"},
    "label2id": {"only": "0"},
    "problem_type": "regression",
}


def _needs_checkout(*args: object, **kwargs: object) -> None:
    raise unittest.SkipTest("needs a helper that the source distribution leaves out")


def _any_helper(name: str) -> Any:
    """Module `__getattr__` of a shell whose helpers are all replaced."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _needs_checkout


_SHELLS: dict[str, dict[str, Any]] = {
    "generation/test_utils.py": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters/test_export.py": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "distributed_testing_utils.py": {"__getattr__": _any_helper},
    "utils/test_configuration_utils.py": {"config_common_kwargs": _COMMON_KWARGS},
}


def _provide_shells(tests: Path) -> list[str]:
    """Register a shell for each known file missing under `tests`; returns the names of the missing files."""
    missing = [name for name in _SHELLS if not (tests / name).is_file()]
    for name in missing:
        *packages, module_name = Path(name).with_suffix("").parts
        parent = "tests"
        for package_name in packages:
            parent = f"{parent}.{package_name}"
            package = ModuleType(parent)
            package.__path__ = []
            sys.modules.setdefault(parent, package)
        module = ModuleType(f"{parent}.{module_name}")
        vars(module).update(_SHELLS[name])
        sys.modules[module.__name__] = module
    return missing


def _causal_lm_base(tests: Path) -> type:
    """Transformers' collection of tests for causal language models, or the same made of the mixins that are there."""
    if (tests / "causal_lm_tester.py").is_file():
        return importlib.import_module("tests.causal_lm_tester").CausalLMModelTest
    mixins = {
        "modeling_common": "ModelTesterMixin",
        "training_mixin": "TrainingTesterMixin",
        "tensor_parallel_mixin": "TensorParallelTesterMixin",
        "fsdp_mixin": "FSDPTesterMixin",
    }
    classes = [getattr(importlib.import_module(f"tests.test_{module}"), name) for module, name in mixins.items()]
    generation = importlib.import_module("tests.generation.test_utils").GenerationTesterMixin
    return type("CausalLMModelTest", (classes[0], generation, *classes[1:]), {})


_TESTS = Path(importlib.import_module("tests").__file__ or "").parent
MISSING = _provide_shells(_TESTS)
CausalLMModelTest = _causal_lm_base(_TESTS)
"""The base class of `suite.MegalodonModelTest`."""
if not (_TESTS / "causal_lm_tester.py").is_file():
    MISSING.append("causal_lm_tester.py")
