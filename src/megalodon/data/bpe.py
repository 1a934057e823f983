"""Training a byte-level byte-pair encoding on a corpus, with the `tokenizers` library.

The alphabet is the 256 bytes, so every text can be written and decoding gives it back exactly. Words are split by
GPT-2's pattern; the only special token is the end of a document.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megalodon.data.cutting import cut_at_words
from megalodon.data.pretrained import PretrainedTokenizer

END_OF_DOCUMENT = "<|endoftext|>"
LONGEST_RUN = 1 << 20  # characters without a space that are learned from as one
SMALLEST_VOCABULARY = 257  # the bytes and the end of a document


def train_bpe(
    documents: Iterable[Iterable[str]], vocab_size: int, min_frequency: int = 2, show_progress: bool = False
) -> PretrainedTokenizer:
    """A byte-level BPE of at most `vocab_size` ids learned from documents, each given in pieces.

    It holds fewer ids where the text has too few pairs that occur `min_frequency` times. The same text gives the same
    tokenizer. Raises ValueError for a vocabulary under 257 and for a corpus without text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; it must be {SMALLEST_VOCABULARY} or more: 256 bytes and the end")
    if min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency}; it must be 1 or more")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    read = 0

    def pieces() -> Iterator[str]:
        nonlocal read
        for document in documents:
            for piece in cut_at_words(document, longest=LONGEST_RUN):
                read += len(piece)
                yield piece

    backend.train_from_iterator(pieces(), trainer)
    if not read:
        raise ValueError("the corpus has no text to learn a vocabulary from: every document is empty")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    )
    return PretrainedTokenizer(wrapped, f"bpe-{len(wrapped)}")


def train_bpe_folder(
    documents: Iterable[Iterable[str]],
    folder: Path,
    vocab_size: int,
    min_frequency: int = 2,
    show_progress: bool = False,
) -> PretrainedTokenizer:
    """`train_bpe`, saved in `folder`, which appears complete or not at all.

    Raises FileExistsError, before any work, for a folder that exists and is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: give a new or empty folder for the tokenizer")
    trained = train_bpe(documents, vocab_size, min_frequency, show_progress=show_progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        complete = Path(temporary) / folder.name
        trained.save(complete)
        complete.replace(folder)
    return trained
