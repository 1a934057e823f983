"""Text to token ids and back: what every tokenizer offers, the built-in byte tokenizer, and `load_tokenizer`.

Special tokens (the end-of-document token and its like) are not text: text that happens to spell one is encoded as
ordinary text, they decode to nothing, and they count zero bytes. So `decode(encode(text)) == text`, and
`num_bytes(ids)` is the size of the UTF-8 text that the ids stand for.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from megalodon.data.byte_level import BYTE_TO_CHARACTER
from megalodon.files import disk_errors

TokenIds: TypeAlias = "Sequence[int] | np.ndarray"

BATCH_CHARACTERS = 1 << 18
CUT_CHARACTERS = 1 << 16

# A hub name such as `gpt2` or `mistralai/Mistral-7B-v0.1`: what a missing path is tried as.
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


class Encoded(NamedTuple):
    """Ids [n] int64, and for each the bytes [n] int64 of the text that it stands for, or None where nobody can tell."""

    ids: np.ndarray
    sizes: np.ndarray | None


class Tokenizer(ABC):
    """Text to token ids and back. `vocab_size` is the largest id plus one; ids are int64 [n] arrays.

    Attributes: `name` for people, `fingerprint` (sha256) that differs whenever ids may differ, `eos_token_id` which
    ends every document or None, `token_bytes` the UTF-8 bytes of each id (special tokens have none, `b""`), or None
    where the tokenizer cannot map its tokens to bytes; `sizes_by_id` whether these are all that an id ever stands for,
    so that their lengths are the sizes of `encode_pieces`; `separators` the words by which its makers end a document.
    """

    name: str
    fingerprint: str
    vocab_size: int
    eos_token_id: int | None
    token_bytes: list[bytes] | None
    sizes_by_id: bool
    separators: tuple[str, ...] = ("<|endoftext|>", "<|end_of_text|>")

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, each on its own, without special tokens."""

    @abstractmethod
    def encode_pieces(self, texts: Sequence[str], continues: Sequence[bool]) -> list[Encoded]:
        """Ids of pieces that `cut` made, with the bytes of text that each stands for.

        Args:
            continues: for each, whether it goes on from a piece before rather than begins a text.
        """

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Every token as the tokenizer spells it, with its id."""

    @abstractmethod
    def decode(self, ids: TokenIds) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Raises ValueError for an id out of range."""

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes ids one after another and never gives out half a character."""

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Write the files from which `load_tokenizer` and Transformers' `AutoTokenizer` load this tokenizer."""

    def cut(self, pieces: Iterable[str], continues: bool = False) -> Iterator[str]:
        """The same text cut where encoding the pieces one by one equals encoding the whole.

        A tokenizer that knows no such places keeps the text whole, and so needs memory for all of it. `continues`:
        the text goes on from some before.
        """
        if text := "".join(pieces):
            yield text

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids [n] int64 of a text (bytes are taken as UTF-8), without special tokens."""
        return self.encode_batch([text if isinstance(text, str) else text.decode()])[0]

    def encode_stream(self, pieces: Iterable[str], continues: bool = False) -> Iterator[np.ndarray]:
        """Ids of a text that arrives in pieces; together they equal `encode` of the whole. Constant memory where
        `cut` can cut. `continues`: the text goes on from some before, as for `encode_pieces`."""
        for encoded in self.encode_stream_sized(pieces, continues):
            yield encoded.ids

    def encode_stream_sized(self, pieces: Iterable[str], continues: bool = False) -> Iterator[Encoded]:
        """As `encode_stream`, with the bytes of text that each id stands for. No more is read than is needed for the
        first ids; then pieces are put together in ever larger groups, so that a library can use all cores."""
        group: list[str] = []
        characters, wanted, begun = 0, 1, continues
        for text in self.cut(pieces, continues):
            group.append(text)
            characters += len(text)
            if characters >= wanted:
                yield from self.encode_pieces(group, [begun or i > 0 for i in range(len(group))])
                begun, group, characters = True, [], 0
                wanted = min(2 * max(wanted, len(text)), BATCH_CHARACTERS)
        if group:
            yield from self.encode_pieces(group, [begun or i > 0 for i in range(len(group))])

    @cached_property
    def token_lengths(self) -> np.ndarray | None:
        """Bytes of text per id, int64 [vocab_size], or None where tokens do not map to bytes."""
        if self.token_bytes is None:
            return None
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of text that the longest token stands for; 0 where tokens do not map to bytes."""
        return 0 if self.token_lengths is None else int(self.token_lengths.max())

    def num_bytes(self, ids: TokenIds) -> int:
        """Size in bytes of the text of `ids`. Raises ValueError where tokens do not map to bytes."""
        if self.token_lengths is None:
            raise ValueError(f"tokenizer {self.name!r} cannot map tokens to bytes: count the bytes of the text instead")
        return int(self.token_lengths[np.asarray(ids, dtype=np.int64)].sum())

    def _check_ids(self, ids: TokenIds) -> np.ndarray:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(
                f"token ids out of range: {int(array.min())} to {int(array.max())} given, "
                f"tokenizer {self.name!r} has 0 to {self.vocab_size - 1}"
            )
        return array


class StreamDecoder(ABC):
    """Text from ids that arrive one after another. The texts given out, `flush` included, add up to `decode` of all
    (where all ends inside a character, some tokenizers' own `decode` loses more than that character)."""

    @abstractmethod
    def feed(self, ids: int | TokenIds) -> str:
        """The text that these ids complete; empty while a character is not complete."""

    @abstractmethod
    def flush(self) -> str:
        """What is left: U+FFFD for a character that was never completed. The decoder starts afresh."""


class ByteStreamDecoder(StreamDecoder):
    """For tokenizers whose tokens are bytes: joins them and holds back an incomplete UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.token_bytes is not None
        self._tokenizer = tokenizer
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: int | TokenIds) -> str:
        checked = self._tokenizer._check_ids([ids] if isinstance(ids, int | np.integer) else ids)
        return self._utf8.decode(b"".join(self._bytes[i] for i in checked.tolist()))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8 text. Byte 0 occurs in no text, so it serves as the end of a document."""

    name = "bytes"
    vocab_size = 256
    eos_token_id = 0

    sizes_by_id = True

    def __init__(self) -> None:
        self.fingerprint = hashlib.sha256(b"megalodon bytes 1").hexdigest()
        self.token_bytes = [b"", *(bytes([i]) for i in range(1, 256))]

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text.encode() if isinstance(text, str) else text
        if b"\0" in raw:
            raise ValueError(f"byte {raw.index(0)} is NUL, which ends a document and cannot be part of a text")
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_pieces(self, texts: Sequence[str], continues: Sequence[bool]) -> list[Encoded]:
        return [Encoded(ids, np.ones(len(ids), dtype=np.int64)) for ids in self.encode_batch(texts)]

    def vocabulary(self) -> dict[str, int]:
        return {"\0": 0} | {BYTE_TO_CHARACTER[byte]: byte for byte in range(1, 256)}

    def cut(self, pieces: Iterable[str], continues: bool = False) -> Iterator[str]:
        for piece in pieces:
            yield from (piece[start : start + CUT_CHARACTERS] for start in range(0, len(piece), CUT_CHARACTERS))

    def decode(self, ids: TokenIds) -> str:
        return self._check_ids(ids).astype(np.uint8).tobytes().replace(b"\0", b"").decode(errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        return ByteStreamDecoder(self)

    def save(self, folder: Path | str) -> None:
        from megalodon.data.byte_transformers import byte_tokenizer_for_transformers

        save_pretrained(byte_tokenizer_for_transformers(), folder)


def save_pretrained(tokenizer: Any, folder: Path | str) -> None:
    """`tokenizer.save_pretrained(folder)` with every file written under a temporary name and renamed."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=target) as temporary:
        with disk_errors(target):
            tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            path.replace(target / path.name)


def same_tokens(one: Tokenizer, other: Tokenizer) -> str | None:
    """None if each id that both tokenizers have is the same token in both; else what the first other one is in each."""
    if one.fingerprint == other.fingerprint:
        return None
    by_id, other_by_id = ({index: token for token, index in of.vocabulary().items()} for of in (one, other))
    for index in sorted(by_id.keys() & other_by_id.keys()):
        if by_id[index] != other_by_id[index]:
            return f"id {index} is {by_id[index]!r} in one and {other_by_id[index]!r} in the other"
    return None
