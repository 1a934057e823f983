"""Texts that two sets of documents have in common: whole documents, and documents that stand inside longer ones.

Whole documents are compared by the hashes that the cache keeps. For the rest, a few stretches of each held-out
document are looked for at every place of the training text, with a hash that moves along it; a document counts as
contained where half of its stretches or more are found. So a page that is quoted in a book is found, and two pages with
the same licence at the end are not.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalodon.data.documents import DocumentSet
from megalodon.files import write_text

SHORTEST = 32
"""Tokens under which equal documents are no accident to speak of: empty lines, headings, `yes`."""
STRETCHES = 8
"""Stretches that are looked for, at most, of each document."""
BLOCK = 1 << 20
TABLE_BITS = 22
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it can be divided by modulo 2**64


@dataclass(frozen=True)
class Shared:
    """Documents of both sets, by their number in each, ascending int64: `held_out` [k] stand in `training` [m]."""

    held_out: np.ndarray
    training: np.ndarray

    def __bool__(self) -> bool:
        return len(self.held_out) > 0


def find_shared(training: DocumentSet, held_out: DocumentSet, memory: Path | None = None) -> Shared:
    """The held-out documents whose text the training documents hold, and those that hold it.

    Reads all of the training text once, some fifty million tokens a second; `memory`, a folder, keeps what was found.
    """
    kept = None
    if memory is not None:
        pair = json.dumps([training.fingerprint(), held_out.fingerprint()])
        kept = memory / hashlib.sha256(pair.encode()).hexdigest()[:32]
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(kept.read_text())
            return Shared(*(np.array(found[key], dtype=np.int64) for key in ("held_out", "training")))
    pairs = [*_equal(training, held_out), *_contained(training, held_out)]
    held, trained = (np.unique(np.array([pair[i] for pair in pairs], dtype=np.int64)) for i in (0, 1))
    if kept is not None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps({"held_out": held.tolist(), "training": trained.tolist()}))
    return Shared(held, trained)


def _equal(training: DocumentSet, held_out: DocumentSet) -> Iterator[tuple[int, int]]:
    """(held-out, training) of whole documents with the same ids."""
    hashes = [documents.corpus.document_hashes[documents.indices] for documents in (training, held_out)]
    candidates = held_out.whole & (held_out.lengths >= SHORTEST)
    by_hash = {int(hashes[1][i]): int(i) for i in np.flatnonzero(candidates)}
    for i in np.flatnonzero(training.whole & np.isin(hashes[0], hashes[1][candidates])):
        yield by_hash[int(hashes[0][i])], int(i)
    for i in np.flatnonzero(candidates & np.isin(hashes[1], hashes[0][training.whole])):
        j = int(np.flatnonzero(training.whole & (hashes[0] == hashes[1][i]))[0])
        yield int(i), j


def _contained(training: DocumentSet, held_out: DocumentSet) -> Iterator[tuple[int, int]]:
    """(held-out, training) of documents one of which stands inside the other."""
    width = 128 if held_out.corpus.vocab_size <= 256 else 48
    texts = held_out.without_ends()
    places, owners = _stretches(texts, width)
    if not len(places):
        return
    tokens = texts.corpus.tokens
    wanted = np.array([_hash(tokens[place : place + width]) for place in places], dtype=np.uint64)
    order = np.argsort(wanted, kind="stable")
    found: dict[int, set[int]] = {}
    for position, value in _matching(training, wanted, width):
        first, stop = (int(np.searchsorted(wanted[order], value, side)) for side in ("left", "right"))
        own = training.corpus.tokens[position : position + width]
        for number in order[first:stop].tolist():
            if np.array_equal(own, tokens[places[number] : places[number] + width]):
                document = int(np.searchsorted(training.starts, position, side="right")) - 1
                found.setdefault(number, set()).add(document)
    numbers = {index: number for number, index in enumerate(held_out.indices.tolist())}
    for owner in np.unique(owners).tolist():
        own_stretches = np.flatnonzero(owners == owner).tolist()
        hits = [number for number in own_stretches if number in found]
        if 2 * len(hits) >= len(own_stretches):
            for document in set().union(*(found[number] for number in hits)):
                yield numbers[int(texts.indices[owner])], document


def _stretches(texts: DocumentSet, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(places [k] in the tokens, documents [k]) of up to `STRETCHES` stretches of each document, evenly spread."""
    places, owners = [], []
    for i in range(len(texts)):
        length = int(texts.lengths[i])
        if length >= width:
            count = min(STRETCHES, max(1, length // width))
            spread = np.linspace(0, length - width, count + 2)[1:-1].astype(np.int64)
            places += (int(texts.starts[i]) + np.unique(spread)).tolist()
            owners += [i] * len(np.unique(spread))
    return np.array(places, dtype=np.int64), np.array(owners, dtype=np.int64)


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _hash(tokens: np.ndarray) -> np.uint64:
    """Of a stretch: the sum of its ids + 1 times the powers of `FACTOR`, modulo 2**64."""
    return np.uint64(((tokens.astype(np.uint64) + np.uint64(1)) * _powers(FACTOR, len(tokens))).sum(dtype=np.uint64))


def _matching(training: DocumentSet, wanted: np.ndarray, width: int) -> Iterator[tuple[int, np.uint64]]:
    """(place, hash) of every stretch of training documents whose hash is wanted."""
    table = np.zeros(1 << TABLE_BITS, dtype=bool)
    shift = np.uint64(64 - TABLE_BITS)
    table[(wanted >> shift).astype(np.int64)] = True
    size = min(BLOCK, int(training.corpus.num_tokens))
    up, down = _powers(FACTOR, size), _powers(pow(FACTOR, -1, 1 << 64), size)
    for first, stop in _spans(training, size - width + 1, width):
        ids = training.corpus.tokens[first:stop].astype(np.uint64) + np.uint64(1)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(ids * up[: len(ids)], dtype=np.uint64)])
        hashes = (sums[width:] - sums[:-width]) * down[: len(ids) - width + 1]
        for place in np.flatnonzero(table[(hashes >> shift).astype(np.int64)]):
            if hashes[place] in wanted:
                yield first + int(place), hashes[place]


def _spans(training: DocumentSet, step: int, width: int) -> Iterator[tuple[int, int]]:
    """Spans of tokens of up to `step + width - 1` that together hold each stretch of a document once; documents that
    lie side by side are read as one."""
    if not len(training):
        return
    breaks = np.flatnonzero(training.starts[1:] != training.ends[:-1]) + 1
    edges = np.concatenate([[0], breaks, [len(training)]])
    for a, b in itertools.pairwise(edges):
        begin, end = int(training.starts[a]), int(training.ends[b - 1])
        for first in range(begin, max(begin, end - width + 1), max(1, step)):
            yield first, min(end, first + step + width - 1)
