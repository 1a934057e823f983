"""A training run small enough for a test: four short texts and a model of a hundred thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

WORDS = ["the", "whale", "that", "swam", "below", "long", "memory", "of", "water", "and", "stone"]


def text(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(words)) + "\n"


@pytest.fixture
def tiny(tmp_path: Path) -> dict:
    """The values of a config of 12 steps in `tmp_path/run`."""
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for seed in range(4):
        (corpus / f"{seed}.txt").write_text(text(seed, 300 + 100 * seed))
    return {
        "model": {
            "num_layers": 2,
            "model_dim": 32,
            "z_dim": 16,
            "value_dim": 32,
            "ffn_hidden_dim": 48,
            "norm_num_groups": 4,
            "cema_ndim": 4,
            "chunk_size": 16,
            "swiglu": True,
        },
        "data": {
            "corpus": {"source": str(corpus)},
            "held_out": {"documents": 1},
            "sequence_length": 24,
            "batch_size": 4,
            "cache_folder": str(tmp_path / "cache"),
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 3},
        "run": {"steps": 12, "folder": str(tmp_path / "run")},
        "evaluation": {"every": 4, "max_tokens": 500},
        "sampling": {"every": 6, "max_new_tokens": 5},
        "checkpoint": {"every": 4, "keep": 3},
    }


@pytest.fixture
def write_config(tmp_path: Path):
    """Write values as the YAML file `tmp_path/tiny.yaml`."""

    def write(values: dict) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write
