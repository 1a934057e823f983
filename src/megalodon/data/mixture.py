"""Several sets of documents as one, each with its share of the tokens: weighted mixtures of sources.

A round of a mixture is as long as all its sets together. Each set gives its share of it, and goes on in the next round
where it ended in this one: a set with a small share is read less than once a round, one with a large share more than
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megalodon.data.documents import DocumentSet


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sets of documents by name, with weights that are shares of the tokens (of any sum). Documents are numbered
    through, set after set."""

    sets: tuple[DocumentSet, ...]
    names: tuple[str, ...] = ("",)
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, documents: DocumentSet | Mixture) -> Mixture:
        """The documents themselves if they are a mixture; else the mixture of this one set."""
        return documents if isinstance(documents, Mixture) else cls((documents,))

    @classmethod
    def weighted(cls, sets: Mapping[str, DocumentSet], weights: Mapping[str, float]) -> Mixture:
        """Sets and their weights by name."""
        return cls(tuple(sets.values()), tuple(sets), tuple(weights[name] for name in sets))

    @cached_property
    def num_tokens(self) -> int:
        """Of all sets, once each."""
        return sum(documents.num_tokens for documents in self.sets)

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    @cached_property
    def first(self) -> np.ndarray:
        """The number of the first document of each set, int64 [number of sets + 1], and of one that would follow."""
        return np.cumsum([0, *map(len, self.sets)])

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Tokens that each set gives to a round; 1 or more."""
        if len(self.sets) == 1:
            return (self.num_tokens,)
        total = sum(self.weights)
        return tuple(max(1, round(weight / total * self.num_tokens)) for weight in self.weights)

    def name(self, number: int) -> str:
        """A document's name."""
        index = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.sets[index].name(number - int(self.first[index]))

    def identity(self) -> dict[str, Any]:
        """What a saved position belongs to, in plain values: the content, and how much there is of it."""
        documents, tokens = [len(s) for s in self.sets], [s.num_tokens for s in self.sets]
        whole = self.sets[0].fingerprint()
        if len(self.sets) > 1:
            parts = [[s.fingerprint() for s in self.sets], list(self.names), list(self.weights)]
            whole = hashlib.sha256(repr(parts).encode()).hexdigest()
        return {
            "documents": whole,
            "num_documents": sum(documents),
            "num_tokens": sum(tokens),
            "tokenizer": self.sets[0].corpus.tokenizer_fingerprint,
        }

    def epochs(self, tokens: int) -> dict[str, float]:
        """How often each set was read after so many tokens of the mixture."""
        round_length = sum(self.shares)
        return {
            name: tokens * share / round_length / documents.num_tokens
            for name, share, documents in zip(self.names, self.shares, self.sets, strict=True)
        }

    def tokens(self, sources: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Ids int64 [n] at places of the tokens of the sets `sources` [n]."""
        return _gathered(sources, places, [documents.corpus.tokens for documents in self.sets])

    def text_sizes(self, sources: np.ndarray, places: np.ndarray) -> np.ndarray | None:
        """Bytes of text int64 [n] that they stand for; None where one of the sets cannot tell."""
        if not all(documents.corpus.knows_sizes for documents in self.sets):
            return None
        if len(self.sets) == 1:
            return self.sets[0].corpus.text_sizes(places)
        sizes = np.empty(len(places), dtype=np.int64)
        for number in np.unique(sources):
            own = sources == number
            sizes[own] = self.sets[number].corpus.text_sizes(places[own])
        return sizes


def another_text(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    what: str,
    words: tuple[str, str, str] = ("than it was", "before", "now"),
) -> str | None:
    """What is different in documents whose `identity` was saved, in one sentence; None if they are the same.

    Args:
        what: a name for them. words: what it is compared with, and what the two sides are called.
    """
    if saved.get("documents") == now["documents"]:
        return None
    if "num_documents" not in saved:
        return f"{what} cannot be compared: it was saved by an earlier version, which knew texts by their files' names"
    if saved["tokenizer"] != now["tokenizer"]:
        return f"the tokenizer of {what} is another {words[0]}"
    before, after = (f"{of['num_documents']:,} documents with {of['num_tokens']:,} tokens" for of in (saved, now))
    if before == after:
        return f"{what} is another {words[0]}: as many documents and tokens ({after}), but not the same text"
    return f"{what} is another {words[0]}: {before} {words[1]}, {after} {words[2]}"


def _gathered(sources: np.ndarray, places: np.ndarray, arrays: Sequence[np.ndarray]) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0][places].astype(np.int64)
    values = np.empty(len(places), dtype=np.int64)
    for number in np.unique(sources):
        own = sources == number
        values[own] = arrays[number][places[own]]
    return values
