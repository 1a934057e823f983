"""What a file of a corpus is, told by its name, and how a compressed one is read.

A name ends in the suffix of a format (.txt .md .jsonl .ndjson .json .csv .parquet .arrow) and maybe in that of a
compression (.gz .bz2 .xz .zst). Names that describe a corpus and do not belong to it (a README, a licence, the JSON
files that the datasets library keeps beside its data) are known here too.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

Kind: TypeAlias = Literal["text", "jsonl", "json", "csv", "parquet", "arrow"]

SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KNOWN = " ".join((*SUFFIXES, *COMPRESSIONS))

# Beside a corpus, not of it. Whoever wants one of these read names the file itself.
ABOUT_THE_CORPUS = re.compile(
    r"(readme|license|licence|copying|notice|changelog|citation|contributing|authors)([._-].*)?"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|(sha\d+|md5)sums?(\.txt)?|manifest\.(json|txt)"
    r"|requirements\.txt",
    re.IGNORECASE,
)

BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What the libraries raise for compressed bytes that are cut short or no such bytes."""


def compression_of(path: Path) -> str | None:
    """The suffix of the compression that the name says, or None."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def kind_of(path: Path) -> Kind | None:
    """The format that the name says, compressed or not; None where it says none that is known."""
    name = path.with_suffix("") if compression_of(path) else path
    return SUFFIXES.get(name.suffix.lower())


def is_about_the_corpus(path: Path) -> bool:
    """Whether the name is that of a file that describes a corpus."""
    return ABOUT_THE_CORPUS.fullmatch(path.name) is not None


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as its name says, to be read once from front to back.

    Raises ValueError, naming the file, while they are read, where they are not what the name says or are cut short.
    """
    compression = compression_of(path)
    if compression is None:
        with path.open("rb") as stream:
            yield stream
        return
    with path.open("rb") as raw:  # a file that is missing or forbidden is that, and not a damaged one
        if not raw.read(1):  # some of the libraries take an empty file for empty text
            raise ValueError(f"{path}: not a whole {compression} file (it is empty): fetch or make it again")
    try:
        with _decompressed(path, compression) as stream:
            yield stream
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a whole {compression} file ({reason}): fetch or make it again") from None


def _decompressed(path: Path, compression: str) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if compression in DECOMPRESSORS:
        return io.BufferedReader(_Streams(path, DECOMPRESSORS[compression]))
    import pyarrow  # the standard library knows Zstandard from Python 3.14 on

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


class _Streams(io.RawIOBase):
    """Compressed streams one after another, and zeros behind them. What else follows is damage, where the standard
    library would take it for the end."""

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        super().__init__()
        self._file, self._make = path.open("rb"), make
        self._decompressor = make()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """At the end 0. Raises OSError, EOFError or LZMAError where the bytes are no whole streams."""
        while True:
            given = b""
            if self._decompressor.eof:
                given = self._decompressor.unused_data.lstrip(b"\0")
                while not given:
                    if not (block := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                        return 0
                    given = block.lstrip(b"\0")
                self._decompressor = self._make()
            elif self._decompressor.needs_input and not (given := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                raise EOFError("it ends before its last stream does")
            if data := self._decompressor.decompress(given, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


DECOMPRESSORS: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}


@contextmanager
def open_seekable(path: Path) -> Iterator[BinaryIO]:
    """As `open_binary`, for formats that are read from their end: what is compressed is first unpacked to a file."""
    with open_binary(path) as stream:
        if compression_of(path) is None:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            while block := stream.read(1 << 20):
                unpacked.write(block)
            unpacked.seek(0)
            yield cast(BinaryIO, unpacked)
