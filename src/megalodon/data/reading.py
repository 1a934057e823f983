"""Reading text strictly: UTF-8 text in pieces, and rows of JSONL and Parquet files.

Text is taken as it stands, byte for byte: no newline is translated, no byte-order mark removed, no bad byte replaced.
What is not text is refused with one error that says where.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """The text of a UTF-8 file in pieces of about 1 MiB; every iteration opens the file anew."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as stream:
            yield from read_text(stream, str(self.path))


def read_text(stream: BinaryIO, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """UTF-8 text of any length from a binary stream (a file, standard input) in pieces that cut no character.

    Raises ValueError naming `name` and the byte at fault where the stream holds a NUL byte or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
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
            raise ValueError(f"{origin}: field {field!r} holds a lone surrogate at character {error.start}") from None
    return value


def jsonl_texts(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(origin `path:line`, text) of each line of a JSONL file; blank lines are passed over."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            origin = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{origin}: not a JSON object on one line ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{origin}: holds {type(row).__name__}, not a JSON object with a field {field!r}")
            if field not in row:
                raise ValueError(
                    f"{origin}: no field {field!r}: set field to one of {', '.join(sorted(row)) or '(none)'}"
                )
            yield origin, check_text(row[field], origin, field)


def parquet_texts(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(origin `path:row`, text) of each row of a Parquet file, read in batches."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise ValueError(f"{path}: no field {field!r}: set field to one of {', '.join(columns)}")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield f"{path}:{number}", check_text(value, f"{path}:{number}", field)
                    number += 1
    except pyarrow.ArrowException as error:  # among them ArrowInvalid, which is a ValueError without the path
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable Parquet file ({reason})") from None
