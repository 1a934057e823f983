"""Reading text strictly: UTF-8 text in pieces, from files that may be compressed, and from rows' values.

Text is taken as it stands, byte for byte: no newline is translated, no byte-order mark removed, no bad byte replaced.
What is not text is refused with one error that says where.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megalodon.data.formats import open_binary

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """The text of a UTF-8 file in pieces of about 1 MiB, decompressed as its name says; every iteration opens it."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with open_binary(self.path) as stream:
            yield from read_text(stream, str(self.path))


def read_text(stream: BinaryIO, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """UTF-8 text of any length from a binary stream (a file, standard input) in pieces that cut no character.

    A byte order mark at its beginning says how the text is written and is no part of it.

    Raises ValueError naming `name` and the byte at fault where the stream holds a NUL byte or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, begun = 0, False
    while True:
        block = stream.read(piece_bytes)
        if (nul := block.find(b"\0")) >= 0:
            raise ValueError(f"{name}: byte {position + nul} is NUL, so this is a binary file; give UTF-8 text")
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: not UTF-8 text at byte {position - held + error.start} ({error.reason}): "
                "leave binary files out, and convert text first, for example with: iconv -f latin1 -t utf-8"
            ) from None
        if text and not begun:
            text, begun = text.removeprefix("\ufeff"), True
        if text:
            yield text
        if not block:
            return
        position += len(block)


def check_text(value: Any, origin: str, field: str) -> str:
    """`value` if it is text that UTF-8 can write and that has no NUL; otherwise a ValueError naming row and field."""
    if not isinstance(value, str):
        raise ValueError(f"{origin}: field {field!r} holds {type(value).__name__}, not text")
    if "\0" in value:
        raise ValueError(f"{origin}: field {field!r} holds a NUL character at {value.index(chr(0))}, so it is not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # Bytes that were no UTF-8 stand in the text as these surrogates.
            escaped = "\udc80" <= value[error.start] <= "\udcff"
            what = "a byte that is not UTF-8" if escaped else "a lone surrogate"
            raise ValueError(f"{origin}: field {field!r} holds {what} at character {error.start}") from None
    return value
