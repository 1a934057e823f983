"""The byte tokenizer as Transformers has tokenizers: what a saved folder holds."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megalodon.data.byte_level import BYTE_TO_CHARACTER


def byte_tokenizer_for_transformers() -> PreTrainedTokenizerFast:
    """`ByteTokenizer` as a Transformers tokenizer: a byte-level BPE without merges whose ids are the bytes.

    Byte 0 is spelled as itself, not by its character of the alphabet (U+0100, which text may hold), so that it can be
    the special token for end of document and padding.
    """
    vocabulary = {"\0": 0} | {BYTE_TO_CHARACTER[byte]: byte for byte in range(1, 256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("\0", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="\0", pad_token="\0", clean_up_tokenization_spaces=False
    )
