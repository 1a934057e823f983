"""Sets of documents for training and held-out measurement. A document is in one of the two, never in both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megalodon.data.cache import TokenizeProgress, tokenize
from megalodon.data.corpus import CorpusConfig
from megalodon.data.tokenized import TokenizedCorpus
from megalodon.data.tokenizer import Tokenizer

DEFAULT_FRACTION = 0.05


class HeldOutConfig(BaseModel):
    """What to keep out of training: a fraction of the tokens, a number of documents, or another corpus. One of them;
    with none given, 5 % of the tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fraction: float | None = Field(default=None, gt=0, lt=1, description="of the corpus's tokens, in whole documents")
    documents: int | None = Field(default=None, ge=1, description="this many documents, drawn by the seed")
    corpus: CorpusConfig | None = Field(
        default=None, description="a corpus of its own; training keeps all of the first"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        ways = [key for key in ("fraction", "documents", "corpus") if given.get(key) is not None]
        if len(ways) > 1:
            raise ValueError(f"give one of fraction, documents and corpus; {' and '.join(ways)} were given")
        return given if ways else given | {"fraction": DEFAULT_FRACTION}


@dataclass(frozen=True, eq=False)
class DocumentSet:
    """Documents of a corpus, in the corpus's order: `indices` [n] int64 of the documents, and the tokens of each that
    belong to the set, `starts` [n] to `ends` [n] int64 in `corpus.tokens`: whole documents, except where a corpus of
    one document was cut in two."""

    corpus: TokenizedCorpus
    indices: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, corpus: TokenizedCorpus, indices: np.ndarray | None = None) -> DocumentSet:
        """Whole documents: those with these indices, or all."""
        chosen = np.arange(corpus.num_documents) if indices is None else np.sort(np.asarray(indices, dtype=np.int64))
        return cls(corpus, chosen, corpus.offsets[chosen], corpus.offsets[chosen + 1]).without_empty()

    def without_empty(self) -> DocumentSet:
        keep = self.ends > self.starts
        return DocumentSet(self.corpus, self.indices[keep], self.starts[keep], self.ends[keep])

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def num_bytes(self) -> int | None:
        """Size of the texts in UTF-8 bytes; None for a part of a document whose tokens do not map to bytes."""
        if (self.lengths == np.diff(self.corpus.offsets)[self.indices]).all():
            return int(self.corpus.document_bytes[self.indices].sum())
        if self.corpus.token_lengths is None:
            return None
        return sum(int(self.corpus.token_lengths[self.tokens(i)].sum()) for i in range(len(self)))

    def name(self, index: int) -> str:
        return str(self.corpus.names[int(self.indices[index])])

    def tokens(self, index: int) -> np.ndarray:
        """The ids [length] of one document, a view."""
        return self.corpus.tokens[self.starts[index] : self.ends[index]]

    def fingerprint(self) -> str:
        """Identifies the tokens of the set and their order."""
        digest = hashlib.sha256(self.corpus.fingerprint.encode())
        digest.update(np.ascontiguousarray(self.starts).tobytes() + np.ascontiguousarray(self.ends).tobytes())
        return digest.hexdigest()


def split_documents(
    corpus: TokenizedCorpus, fraction: float | None = None, documents: int | None = None, seed: int = 0
) -> tuple[DocumentSet, DocumentSet]:
    """(training, held-out) by document, drawn by `seed`; give `fraction` (of the tokens) or `documents` (how many).

    By fraction, documents are drawn in random order, and one is taken if that brings the held-out tokens nearer to the
    fraction, so that one huge document does not swallow the training set; if none does, the smallest is taken. A corpus
    of one document keeps its tail out (with `documents: 1`, the tail of 5 %). Raises ValueError where nothing would
    be left to train on.
    """
    if (fraction is None) == (documents is None):
        raise ValueError("held out: give either a fraction of the tokens or a number of documents")
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"held out: fraction is {fraction}; it must lie between 0 and 1")
    everything = DocumentSet.of(corpus)
    n = len(everything)
    if n == 1 and documents in (None, 1):
        return _cut_tail(everything, fraction or DEFAULT_FRACTION)
    if documents is not None and not 1 <= documents < n:
        raise ValueError(f"held out: documents is {documents}; the corpus has {n}, so give 1 to {n - 1}")
    order = np.random.default_rng([seed, 0x5E1D]).permutation(n)
    if documents is not None:
        held = order[:documents]
    else:
        held = _draw_tokens(everything.lengths, order, (fraction or DEFAULT_FRACTION) * everything.num_tokens)
    mask = np.zeros(n, dtype=bool)
    mask[held] = True
    return tuple(DocumentSet.of(corpus, everything.indices[part]) for part in (~mask, mask))  # type: ignore[return-value]


def _draw_tokens(lengths: np.ndarray, order: np.ndarray, target: float) -> np.ndarray:
    """Documents, in this order, each of which brings the sum of lengths nearer to the target; never all of them."""
    taken: list[int] = []
    missing = target
    for i in order.tolist():
        if missing <= 0 or len(taken) == len(order) - 1:
            break
        if lengths[i] < 2 * missing:
            taken.append(i)
            missing -= int(lengths[i])
    return np.array(taken or [int(np.argmin(lengths))], dtype=np.int64)


def _cut_tail(whole: DocumentSet, fraction: float) -> tuple[DocumentSet, DocumentSet]:
    border = whole.ends - max(1, round(fraction * whole.num_tokens))
    head = DocumentSet(whole.corpus, whole.indices, whole.starts, border).without_empty()
    return head, DocumentSet(whole.corpus, whole.indices, border, whole.ends)


def check_sizes(training: DocumentSet, held_out: DocumentSet, sequence_length: int) -> None:
    """Raise ValueError unless both sets hold one document and one sequence with its targets."""
    for documents, which, remedy in (
        (training, "training set", "a larger corpus, or hold out less"),
        (held_out, "held-out set", "more held-out documents, a larger fraction, or a larger corpus"),
    ):
        if documents.num_tokens < sequence_length + 1:
            raise ValueError(
                f"the {which} is too small: {documents.num_tokens} tokens in {len(documents)} documents, but "
                f"sequence_length {sequence_length} needs at least {sequence_length + 1}; give {remedy}, or a shorter "
                "sequence_length"
            )


def prepare_documents(
    corpus: CorpusConfig,
    held_out: HeldOutConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    seed: int = 0,
    cache_folder: Path | str | None = None,
    progress: Callable[[TokenizeProgress], None] | None = None,
) -> tuple[DocumentSet, DocumentSet]:
    """(training, held-out) documents of a corpus: found, tokenised or opened from the cache, split and checked."""
    tokens = tokenize(corpus, tokenizer, cache_folder, progress)
    if held_out.corpus is not None:
        other = tokenize(held_out.corpus, tokenizer, cache_folder, progress)
        training, kept = DocumentSet.of(tokens), DocumentSet.of(other)
    else:
        training, kept = split_documents(tokens, held_out.fraction, held_out.documents, seed)
    check_sizes(training, kept, sequence_length)
    return training, kept
