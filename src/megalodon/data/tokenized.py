"""Documents as token ids: one array that knows where each of them begins, their names and their lengths."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalodon.data.letters import letters_of
from megalodon.data.tokenizer import Tokenizer

SIZE_DTYPE = np.dtype("<u4")
"""Of the bytes that a token stands for: an unknown word may be a long one."""


class DocumentNames(Sequence[str]):
    """Names of documents, kept as one UTF-8 array so that millions of them stay small."""

    def __init__(self, joined: np.ndarray, ends: np.ndarray) -> None:
        self.joined, self.ends = joined, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> DocumentNames:
        encoded = [name.encode(errors="surrogateescape") for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = int(self.ends[i - 1]) if i else 0
        return self.joined[start : int(self.ends[i])].tobytes().decode(errors="replace")


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Documents as token ids.

    `tokens` [T] (unsigned, usually memory-mapped), `offsets` [n+1] int64: document i is
    tokens[offsets[i]:offsets[i+1]], its end-of-document id included; `document_bytes` [n] int64: size of each text in
    UTF-8; `document_hashes` [n] uint64 of each document's letters (letters.py); `sizes` [T] uint32: bytes of text that
    each token stands for, where ids alone do not tell; `token_lengths` [vocab_size] int64: bytes per id, or None where
    there is no such table; `fingerprint`: of the documents' ids and borders and of the tokenizer, wherever and in
    whatever files they were found. `bad_rows` and `separators` say what was met on the way: rows left out, words that
    may be separators.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    document_bytes: np.ndarray
    document_hashes: np.ndarray
    names: Sequence[str]
    vocab_size: int
    eos_token_id: int | None
    token_lengths: np.ndarray | None
    tokenizer_name: str
    tokenizer_fingerprint: str
    fingerprint: str
    max_token_id: int
    sizes: np.ndarray | None = None
    folder: Path | None = None
    bad_rows: str | None = None
    separators: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def knows_sizes(self) -> bool:
        """Whether it is known how many bytes of text tokens stand for."""
        return self.sizes is not None or self.token_lengths is not None

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def text_sizes(self, places: Any) -> np.ndarray | None:
        """Bytes of text that the tokens at these places (a slice or an array) stand for, int64, or None if unknown."""
        if self.sizes is not None:
            return self.sizes[places].astype(np.int64)
        if self.token_lengths is not None:
            return self.token_lengths[self.tokens[places]]
        return None

    @classmethod
    def from_documents(cls, documents: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> TokenizedCorpus:
        """A corpus in memory from (name, text) pairs, for texts that are not worth a cache."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        pieces = tokenizer.encode_pieces([text for _, text in documents], [False] * len(documents))
        encoded = [np.append(piece.ids, np.array(end, dtype=np.int64)) for piece in pieces]
        tokens = np.concatenate([*encoded, np.zeros(0, np.int64)]).astype(id_dtype(tokenizer.vocab_size))
        if not len(tokens):
            raise ValueError("no text: every document is empty")
        sizes = None
        known = [piece.sizes for piece in pieces if piece.sizes is not None]
        if not tokenizer.sizes_by_id and len(known) == len(pieces):
            sizes = np.concatenate([np.append(part, np.zeros(len(end), np.int64)) for part in known]).astype(SIZE_DTYPE)
        digest, borders = ContentDigest(tokenizer), np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        for (_, text), (first, stop) in zip(documents, itertools.pairwise(borders), strict=True):
            digest.add(tokens[first:stop], text)
            digest.end_document()
        return cls(
            tokens=tokens,
            offsets=borders,
            document_bytes=np.array([len(text.encode()) for _, text in documents], dtype=np.int64),
            document_hashes=digest.document_hashes(),
            names=[name for name, _ in documents],
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            token_lengths=tokenizer.token_lengths,
            tokenizer_name=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            fingerprint=digest.fingerprint(borders),
            max_token_id=int(tokens.max()),
            sizes=sizes,
        )


class ContentDigest:
    """The fingerprint of documents by their ids, and a hash of the letters of each, as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._all = hashlib.sha256(tokenizer.fingerprint.encode())
        self._one = hashlib.blake2b(digest_size=8)
        self._hashes = bytearray()

    def add(self, ids: np.ndarray, text: str = "") -> None:
        """More ids of the present document, in the dtype of the corpus, and the text that they stand for."""
        self._all.update(ids.tobytes())
        self._one.update(letters_of(text.encode()))

    def end_document(self) -> None:
        """The next ids are those of another document."""
        self._hashes += self._one.digest()
        self._one = hashlib.blake2b(digest_size=8)

    def document_hashes(self) -> np.ndarray:
        """One uint64 a document."""
        return np.frombuffer(bytes(self._hashes), dtype="<u8").copy()

    def fingerprint(self, offsets: np.ndarray) -> str:
        """Of all, with their borders [n+1] int64."""
        whole = self._all.copy()
        whole.update(np.asarray(offsets, dtype="<i8").tobytes())
        return whole.hexdigest()


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16, uint32 (little-endian) that holds ids below `vocab_size`."""
    return np.dtype(np.min_scalar_type(vocab_size - 1)).newbyteorder("<")


def check_vocabulary(source: Tokenizer | TokenizedCorpus, vocab_size: int) -> None:
    """Raise ValueError unless every id of a tokenizer or of a tokenised corpus is below the model's `vocab_size`."""
    if isinstance(source, TokenizedCorpus):
        largest, what = source.max_token_id, f"the corpus (tokenizer {source.tokenizer_name!r})"
    else:
        largest, what = source.vocab_size - 1, f"tokenizer {source.name!r}"
    if largest >= vocab_size:
        raise ValueError(
            f"token ids out of range: {what} has ids up to {largest}, the model's vocab_size is {vocab_size}; "
            f"set vocab_size to {largest + 1} or more, or use the tokenizer that the model was made for"
        )
