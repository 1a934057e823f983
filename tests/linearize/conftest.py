"""A small Llama in a folder, and text to linearise it on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon.data import ByteTokenizer

TEXT = "".join(f"{number} times {number} is {number * number}.\n" for number in range(600))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, grouped heads, on bytes; its weights are drawn, and large enough to matter."""
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), ByteTokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Keys of a run of a few steps."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return [
        f"data.corpus.source={text}",
        "data.sequence_length=32",
        "data.batch_size=2",
        f"data.cache_folder={tmp_path / 'cache'}",
        "checkpoint.every=2",
        "evaluation.max_tokens=200",
    ]
