"""A tiny model and a byte-level tokenizer, as other people's tools take them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megalodon import MegalodonConfig, MegalodonForCausalLM

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}
LETTERS = {letter: i + len(SPECIAL) for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte; adds neither beginnings nor ends."""
    tokenizer = Tokenizer(models.BPE(vocab=SPECIAL | LETTERS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny(**fields: Any) -> MegalodonForCausalLM:
    """Two layers, chunks of 16, the tokenizer's ids."""
    torch.manual_seed(11)
    return MegalodonForCausalLM(tiny_config(**fields)).eval()


def tiny_config(**fields: Any) -> MegalodonConfig:
    sizes: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(LETTERS),
        "num_layers": 2,
        "model_dim": 64,
        "z_dim": 32,
        "value_dim": 64,
        "num_heads": 2,
        "ffn_hidden_dim": 64,
        "cema_ndim": 4,
        "chunk_size": 16,
        "norm_num_groups": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return MegalodonConfig(**{**sizes, **fields})
