"""Texts that two sets of documents have in common: whole documents, and documents that stand inside longer ones.

Texts are compared by their letters: all bytes but white space and byte order marks, so that a copy with other line
ends, or a newline more at its end, is the same text. Whole documents are compared by the hashes that the cache keeps.
For the rest, a few stretches of each held-out document are looked for at every place of the training text, with a hash
that moves along it; a document counts as contained where half of its stretches or more are found. So a page that is
quoted in a book is found, and two pages with the same licence at the end are not.
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
from megalodon.data.letters import TokenLetters
from megalodon.data.tokenizer import Tokenizer
from megalodon.files import write_text

METHOD = 2
"""Told from what an older version remembered."""
SHORTEST = 32
"""Letters under which one equal document is an accident: empty lines, headings, `yes`."""
WIDE, NARROW = 96, SHORTEST
"""Letters of a stretch, and of those of documents that are shorter than one."""
STRETCHES = 8
"""Stretches that are looked for, at most, of each document."""
BLOCK = 1 << 18
"""Tokens that are read at a time."""
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it can be divided by modulo 2**64

Pairs = set[tuple[int, int]]


@dataclass(frozen=True)
class Shared:
    """Documents of both sets, by their number in each, ascending int64: `held_out` [k] stand in `training` [m]."""

    held_out: np.ndarray
    training: np.ndarray

    def __bool__(self) -> bool:
        return len(self.held_out) > 0


def find_shared(
    training: DocumentSet,
    held_out: DocumentSet,
    tokenizer: Tokenizer,
    memory: Path | None = None,
    every: bool = False,
) -> Shared:
    """The held-out documents whose text the training documents hold, and training documents that hold it.

    Documents of less than `SHORTEST` letters count where more than half of the held-out text is shared with them.

    Args:
        tokenizer: that of both sets.
        memory: a folder that keeps what was found. Else all of the training text is read, some ten million tokens a
            second.
        every: find every training document that stands inside a held-out one too, not some of them.
    """
    kept = None
    if memory is not None:
        pair = json.dumps([METHOD, every, training.fingerprint(), held_out.fingerprint()])
        kept = memory / hashlib.sha256(pair.encode()).hexdigest()[:32]
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(kept.read_text())
            return Shared(*(np.array(found[key], dtype=np.int64) for key in ("held_out", "training")))
    letters = TokenLetters(tokenizer)
    counts = _letter_counts(held_out, letters)
    found_pairs = _equal(training, held_out) | _contained(training, held_out, letters, counts)
    pairs = {pair for pair in found_pairs if counts[pair[0]] >= SHORTEST}
    short = found_pairs - pairs
    if short and 2 * held_out.lengths[_numbers(pairs | short, 0)].sum() > held_out.num_tokens:
        pairs |= short
    if pairs and every:
        turned = _contained(held_out, training, letters, _letter_counts(training, letters))
        pairs |= {(held, trained) for trained, held in turned}
    shared = Shared(_numbers(pairs, 0), _numbers(pairs, 1))
    if kept is not None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps({"held_out": shared.held_out.tolist(), "training": shared.training.tolist()}))
    return shared


def _numbers(pairs: Pairs, side: int) -> np.ndarray:
    return np.unique(np.array([pair[side] for pair in pairs], dtype=np.int64))


def _equal(training: DocumentSet, held_out: DocumentSet) -> Pairs:
    """(held-out, training) of whole documents with the same letters: each document of either set once or more."""
    hashes = [documents.corpus.document_hashes[documents.indices] for documents in (training, held_out)]
    first = {int(hashes[1][i]): int(i) for i in np.flatnonzero(held_out.whole)[::-1]}
    trained = np.flatnonzero(training.whole & np.isin(hashes[0], hashes[1][held_out.whole]))
    where = {int(hashes[0][j]): int(j) for j in trained[::-1]}
    pairs = {(first[int(hashes[0][j])], int(j)) for j in trained}
    pairs |= {(int(i), where[int(hashes[1][i])]) for i in np.flatnonzero(held_out.whole) if int(hashes[1][i]) in where}
    return pairs


@dataclass
class _Stretches:
    """Stretches of one width that are looked for: their hashes, and the documents that they are of."""

    width: int
    hashes: list[int]
    owners: list[int]


def _contained(training: DocumentSet, held_out: DocumentSet, letters: TokenLetters, counts: np.ndarray) -> Pairs:
    """(held-out, training) of documents the first of which stand in the second; `counts` [n]: letters of the first."""
    pairs: Pairs = set()
    for stretches in _stretches(held_out, letters, counts):
        if not stretches.hashes:
            continue
        found: dict[int, set[int]] = {}
        wanted = np.unique(np.array(stretches.hashes, dtype=np.uint64))
        for position, value in _matching(training, letters, wanted, stretches.width):
            document = int(np.searchsorted(training.starts, position, side="right")) - 1
            found.setdefault(value, set()).add(document)
        for owner, group in itertools.groupby(zip(stretches.owners, stretches.hashes, strict=True), key=lambda e: e[0]):
            own = [value for _, value in group]
            hits = [found[value] for value in own if value in found]
            if stretches.width == NARROW:
                holders = set.intersection(*hits) if len(hits) == len(own) else set()
            else:
                holders = set.union(*hits) if hits and 2 * len(hits) >= len(own) else set()
            pairs |= {(owner, document) for document in holders}
    return pairs


def _letter_counts(documents: DocumentSet, letters: TokenLetters) -> np.ndarray:
    """Letters of each document, int64 [n]."""
    counts = np.zeros(len(documents), dtype=np.int64)
    for i, (first, stop) in enumerate(zip(documents.starts.tolist(), documents.ends.tolist(), strict=True)):
        for at in range(first, stop, BLOCK):
            counts[i] += letters.lengths[documents.corpus.tokens[at : min(stop, at + BLOCK)]].sum()
    return counts


def _stretches(documents: DocumentSet, letters: TokenLetters, counts: np.ndarray) -> tuple[_Stretches, _Stretches]:
    """Up to `STRETCHES` stretches of each document, evenly spread; the beginning and the end of one that is shorter
    than a stretch; and of one that is shorter still, the beginning of it and of what follows it."""
    wide, narrow = _Stretches(WIDE, [], []), _Stretches(NARROW, [], [])
    run_ends = _run_ends(documents)
    for i, (first, stop) in enumerate(zip(documents.starts.tolist(), documents.ends.tolist(), strict=True)):
        chosen, width = wide, WIDE
        if counts[i] >= WIDE:
            places = np.linspace(first, stop, min(STRETCHES, max(1, int(counts[i]) // WIDE)) + 2)[1:-1].astype(np.int64)
            found = [letters.first(documents.corpus.tokens, int(place), stop, WIDE) for place in places]
            found = [own for own in found if len(own) == WIDE] or [
                letters.first(documents.corpus.tokens, first, stop, WIDE)
            ]
        elif counts[i] >= NARROW:
            chosen, width = narrow, NARROW
            whole = letters.first(documents.corpus.tokens, first, stop, WIDE)
            found = [whole[:width], whole[-width:]]
        elif counts[i]:
            found = [letters.first(documents.corpus.tokens, first, int(run_ends[i]), WIDE)]
        else:
            continue
        hashes = {_hash(own) for own in found if len(own) == width}
        chosen.hashes += hashes
        chosen.owners += [i] * len(hashes)
    return wide, narrow


def _run_ends(documents: DocumentSet) -> np.ndarray:
    """For each document where the run ends of documents that lie side by side, int64 [n]."""
    ends = documents.ends.copy()
    last = np.append(documents.starts[1:] != documents.ends[:-1], True)
    edges = np.flatnonzero(last)
    return ends[edges[np.searchsorted(edges, np.arange(len(ends)))]] if len(ends) else ends


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _hash(letters: np.ndarray) -> int:
    """Of a stretch: the sum of its letters + 1 times the powers of `FACTOR`, modulo 2**64."""
    return int(((letters.astype(np.uint64) + np.uint64(1)) * _powers(FACTOR, len(letters))).sum(dtype=np.uint64))


def _matching(
    training: DocumentSet, letters: TokenLetters, wanted: np.ndarray, width: int
) -> Iterator[tuple[int, int]]:
    """(place of its first token, hash) of every stretch of training documents whose hash is wanted, sorted."""
    bits = min(26, max(16, len(wanted).bit_length() + 6))
    shift = np.uint64(64 - bits)
    table = np.zeros(1 << bits, dtype=bool)
    table[(wanted >> shift).astype(np.int64)] = True
    up = down = np.zeros(0, dtype=np.uint64)
    for first, stop in _runs(training):
        before, places_before = np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.int64)
        for at in range(first, stop, BLOCK):
            own, counts = letters.of(training.corpus.tokens[at : min(stop, at + BLOCK)])
            text = np.concatenate([before, own])
            ends = np.cumsum(counts)
            if len(text) > len(up):
                up, down = _powers(FACTOR, len(text)), _powers(pow(FACTOR, -1, 1 << 64), len(text))
            if len(text) >= width:
                values = (text.astype(np.uint64) + np.uint64(1)) * up[: len(text)]
                sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
                hashes = (sums[width:] - sums[:-width]) * down[: len(text) - width + 1]
                likely = np.flatnonzero(table[(hashes >> shift).astype(np.int64)])
                near = np.searchsorted(wanted, hashes[likely]).clip(max=len(wanted) - 1)
                likely = likely[wanted[near] == hashes[likely]]
                places = _places(likely, places_before, at, ends)
                yield from zip(places.tolist(), hashes[likely].tolist(), strict=True)
            left = np.arange(max(0, len(text) - width + 1), len(text))
            before, places_before = text[left], _places(left, places_before, at, ends)


def _places(numbers: np.ndarray, before: np.ndarray, first: int, ends: np.ndarray) -> np.ndarray:
    """The tokens that letters are of, by their numbers in a text that begins with those of the tokens `before`, and
    goes on with the tokens from `first` on, whose letters end at `ends`."""
    new = first + np.searchsorted(ends, numbers - len(before), side="right")
    return np.concatenate([before[numbers[numbers < len(before)]], new[numbers >= len(before)]])


def _runs(documents: DocumentSet) -> Iterator[tuple[int, int]]:
    """(first, stop) of tokens of documents that lie side by side, which are read as one."""
    if len(documents):
        breaks = np.flatnonzero(documents.starts[1:] != documents.ends[:-1]) + 1
        for a, b in itertools.pairwise([0, *breaks.tolist(), len(documents)]):
            yield int(documents.starts[a]), int(documents.ends[b - 1])
