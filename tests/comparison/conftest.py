"""A comparison small enough for a test: two architectures of six thousand parameters on a few short texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = ["the", "whale", "that", "swam", "below", "long", "memory", "of", "water", "and", "stone"]


def text(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(words)) + "\n"


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """The values of a comparison in `tmp_path/out`."""
    for folder, seeds in (("train", (0, 1, 2)), ("valid", (3,)), ("test", (4, 5))):
        (tmp_path / folder).mkdir()
        for seed in seeds:
            (tmp_path / folder / f"{seed}.txt").write_text(f"{seed} {folder} " * 20 + text(seed, 300))
    megalodon = {
        **{"num_layers": 1, "model_dim": 16, "z_dim": 8, "value_dim": 16, "ffn_hidden_dim": 24, "norm_num_groups": 4},
        **{"cema_ndim": 4, "chunk_size": 16, "swiglu": True},
    }
    llama = {"architecture": "megalodon-kin", "mixers": "attention", "num_layers": 1, "model_dim": 16, "num_heads": 2}
    return {
        "folder": str(tmp_path / "out"),
        "parameters": 15000,
        "tolerance": 0.02,
        "seeds": [0, 1],
        "architectures": {
            "megalodon": {"model": megalodon, "scale": ["model_dim", "z_dim", "value_dim", "ffn_hidden_dim"]},
            "llama": {"model": llama, "train": {"data": {"mode": "reset"}}},
        },
        "train": {
            "data": {
                "corpus": {"source": str(tmp_path / "train")},
                "held_out": {"corpus": {"source": str(tmp_path / "valid")}},
                "sequence_length": 24,
                "batch_size": 4,
                "cache_folder": str(tmp_path / "cache"),
            },
            "schedule": {"warmup_steps": 2},
            "run": {"steps": 8},
            "evaluation": {"every": 4, "max_tokens": 500},
            "checkpoint": {"every": 8},
        },
        "sweep": {"learning_rates": [3e-3, 1e-2, 3e-2], "steps": 4},
        "test": {"corpus": {"source": str(tmp_path / "test")}, "context": 64, "max_tokens": 400},
        "speed": {"lengths": [16, 48], "steps": 2, "decode": 2},
        "processes": 2,
    }


@pytest.fixture
def write_config(tmp_path: Path):
    """Write values as the YAML file `tmp_path/compare.yaml`."""

    def write(values: dict[str, Any]) -> Path:
        path = tmp_path / "compare.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write
