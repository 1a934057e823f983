"""Sets of documents of a tokenised corpus: which of them, and which part of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megalodon.data.tokenized import TokenizedCorpus


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
        return self.chosen(self.ends > self.starts)

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
        if self.whole.all():
            return int(self.corpus.document_bytes[self.indices].sum())
        if not self.corpus.knows_sizes:
            return None
        spans = (slice(first, stop) for first, stop in zip(self.starts, self.ends, strict=True))
        sizes = (self.corpus.text_sizes(span) for span in spans)
        return sum(int(own.sum()) for own in sizes if own is not None)

    @cached_property
    def whole(self) -> np.ndarray:
        """Of each document [n] bool: whether all of it is in the set."""
        return self.lengths == np.diff(self.corpus.offsets)[self.indices]

    def chosen(self, keep: np.ndarray) -> DocumentSet:
        """Those of the documents, by [n] bool or by their numbers, ascending."""
        return DocumentSet(self.corpus, self.indices[keep], self.starts[keep], self.ends[keep])

    def without_ends(self) -> DocumentSet:
        """The same texts without the ids that end documents."""
        if self.corpus.eos_token_id is None:
            return self
        closed = self.ends == self.corpus.offsets[self.indices + 1]
        return DocumentSet(self.corpus, self.indices, self.starts, self.ends - closed).without_empty()

    def first(self, max_tokens: int | None) -> DocumentSet:
        """The first so many tokens of the set: whole documents, and the beginning of one."""
        if max_tokens is None:
            return self
        before = np.cumsum(self.lengths) - self.lengths
        ends = self.starts + np.clip(max_tokens - before, 0, self.lengths)
        return DocumentSet(self.corpus, self.indices, self.starts, ends).without_empty()

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
