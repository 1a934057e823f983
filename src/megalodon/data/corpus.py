"""Where text comes from: a `CorpusConfig` names a source, `Corpus` finds it and yields its documents in a fixed order.

Sources: files, folders and globs of the formats in formats.py, folders of `Dataset.save_to_disk`, datasets of the
Hugging Face hub (streamed), and `stdlib`, the source code of the running Python's standard library. Nothing here knows
of tokens. Everything is read in constant memory: a text file of any length arrives in pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megalodon.choices import CorpusKind
from megalodon.data.content import content_digest, stamps
from megalodon.data.finding import CorpusFile, Found, find_files, is_saved_dataset, stdlib_files
from megalodon.data.formats import compression_of
from megalodon.data.hub import HubRows, commit_of, is_on_hub, local_files
from megalodon.data.reading import TextFile
from megalodon.data.rows import READERS, Row, texts
from megalodon.data.separator import split_at
from megalodon.data.slices import split_parts

BAD_ROWS_SHOWN = 3
FIELD = "text"
"""The field that is read where none is named."""


class CorpusConfig(BaseModel):
    """What to read. A plain mapping with these keys is enough wherever a corpus is asked for.

    With `kind: auto`, `stdlib` is the standard library and anything else a path, a folder (read recursively, links
    followed) or a glob whose files are told apart by suffix; a file of another suffix is text where it is named itself,
    and left out where a folder holds it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | list[str] = Field(
        description="`stdlib`, a file, a folder, a glob, a list of these, or a Hugging Face dataset's or builder's name"
    )
    kind: CorpusKind = "auto"
    field: str = Field(
        default=FIELD,
        min_length=1,
        description="the field that holds the text, where rows have fields; `meta.text` is `text` in `meta`",
    )
    separator: str | None = Field(
        default=None, min_length=1, description="a new document begins after each of these, such as <|endoftext|>"
    )
    bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse", description="skip: leave out rows without text and say how many and which"
    )
    max_documents: int | None = Field(default=None, ge=1, description="read only this many documents")
    name: str | None = Field(default=None, description="Hugging Face: the dataset's configuration")
    split: str | None = Field(
        default=None, description="of a dataset: a split such as train, train[:10%] or train+test; `train` if not given"
    )
    revision: str | None = Field(default=None, description="Hugging Face: a branch, tag or commit")
    data_files: str | list[str] | None = Field(default=None, description="Hugging Face: files for a local builder")

    @model_validator(mode="after")
    def _consistent(self) -> CorpusConfig:
        sources = self.sources
        if not sources or not all(entry.strip() for entry in sources):
            raise ValueError("source is empty: give `stdlib`, a file, a folder, a glob or a dataset's name")
        if self.kind == "huggingface":
            if len(sources) != 1:
                raise ValueError(f"source: kind huggingface reads one dataset, {len(sources)} were given")
        else:
            for key in ("name", "revision", "data_files"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} only has a meaning with kind: huggingface, the kind given is {self.kind}")
            saved = self.kind in ("auto", "arrow") and all(is_saved_dataset(Path(s).expanduser()) for s in sources)
            if self.split is not None and not saved:
                raise ValueError(
                    "split only has a meaning with kind: huggingface, or for a folder that save_to_disk wrote; the "
                    f"kind given is {self.kind}"
                )
        if self.split is not None:
            split_parts(self.split)
        if "stdlib" in sources and len(sources) > 1 and self.kind in ("auto", "stdlib"):
            raise ValueError("source: `stdlib` stands alone, it cannot be one of a list")
        if self.kind == "stdlib" and sources != ["stdlib"]:
            raise ValueError(f"source: kind stdlib reads the source `stdlib`, {self.source!r} was given")
        return self

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def is_stdlib(self) -> bool:
        return self.kind in ("auto", "stdlib") and self.sources == ["stdlib"]

    @property
    def is_dataset(self) -> bool:
        """Whether the datasets library reads it; what `save_to_disk` wrote is read from its files."""
        return self.kind == "huggingface" and not is_saved_dataset(Path(self.sources[0]).expanduser())


@dataclass(frozen=True)
class Document:
    """One document: its origin's name, and its text in pieces. The pieces of a whole file can be iterated more than
    once, those of a part of one as the document comes, before the next one."""

    name: str
    pieces: Iterable[str]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass
class BadRows:
    """Rows that were left out: how many, and what was wrong with the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: ValueError) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < BAD_ROWS_SHOWN:
            self.first.append(str(error))

    def told(self) -> str | None:
        """One sentence; None where there were none."""
        if not self.count:
            return None
        more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        return f"left out {self.count:,} bad row{'s' * (self.count != 1)}: {'; '.join(self.first)}{more}"


class Corpus:
    """A corpus that was found: its files are known, none has been read.

    Raises FileNotFoundError for a source that does not exist and ValueError for one without files. Iterating
    `documents()` raises ValueError for text that is not UTF-8 or holds NUL bytes, for rows that are not what they
    should be, and for a field that is missing, each naming the file and the row; with `bad_rows: skip` rows are counted
    in `bad_rows` instead.

    Attributes: `files` in the order in which they are read (none for a dataset), `found` with what was left out,
    `bad_rows` of the last iteration.
    """

    def __init__(self, config: CorpusConfig | dict[str, Any]) -> None:
        self.config = config if isinstance(config, CorpusConfig) else _validated(config)
        self.bad_rows = BadRows()
        if self.config.is_dataset:
            self.found = Found()
        elif self.config.is_stdlib:
            self.found = stdlib_files()
        else:
            kind = "auto" if self.config.kind == "huggingface" else self.config.kind
            self.found = find_files(self.config.sources, kind, self.config.split)
        if self.config.field != FIELD and self.files and all(file.kind == "text" for file in self.files):
            raise ValueError(
                f"corpus: field {self.config.field!r} has no meaning for source {self.config.source!r}, whose files "
                f"are read as plain text, such as {self.files[0].name}: leave it out, or set kind to what the files are"
            )
        self._revision = self.config.revision

    @property
    def files(self) -> list[CorpusFile]:
        return self.found.files

    @property
    def total_bytes(self) -> int | None:
        """Size of the text, or None where it is not known before reading: of a streamed dataset, of a part of
        something, and of what is compressed or laid out in columns."""
        if self.config.is_dataset or self.config.max_documents is not None:
            return None
        if any(compression_of(file.path) or file.kind in ("parquet", "arrow") for file in self.files):
            return None
        return sum(file.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order: sources as listed, files sorted by path, rows as they stand."""
        self.bad_rows = BadRows()
        return islice(self._documents(), self.config.max_documents)

    def _documents(self) -> Iterator[Document]:
        for name, pieces in self._texts():
            if self.config.separator is None:
                yield Document(name, pieces)
            else:
                for number, part in enumerate(split_at(pieces, self.config.separator)):
                    yield Document(f"{name}#{number}", part)

    def _texts(self) -> Iterator[tuple[str, Iterable[str]]]:
        if self.config.is_dataset:
            yield from self._row_texts(self._hub_rows())
        for file in self.files:
            if file.kind == "text":
                yield file.name, TextFile(file.path)
            else:
                rows = READERS[file.kind](file.path, self.config.field)
                yield from self._row_texts(rows if file.rows is None else islice(rows, *file.rows))

    def _row_texts(self, rows: Iterable[Row]) -> Iterator[tuple[str, Iterable[str]]]:
        for origin, text in texts(rows, self.config.field, self._bad_row):
            yield origin, (text,)

    def _bad_row(self, error: ValueError) -> None:
        if self.config.bad_rows == "refuse":
            raise error
        self.bad_rows.add(error)

    def _hub_rows(self) -> HubRows:
        config = self.config
        options = {"data_files": config.data_files, "revision": self._revision}
        return HubRows(config.sources[0], config.name, config.split, config.field, **options)

    def paths(self) -> list[Path]:
        """Every file on this machine that the text comes from."""
        if self.config.is_dataset:
            return local_files(self.config.sources[0], self._data_files())
        return [file.path for file in self.files]

    def _data_files(self) -> list[str]:
        listed = self.config.data_files or []
        return [listed] if isinstance(listed, str) else listed

    def fingerprint(self, memory: Path | None = None) -> str:
        """Identifies what is read and how: the contents of the files, their names as they are shown, and the request.
        A dataset on the hub is known by the commit that its revision stands for, from which it is then read.

        Args:
            memory: a folder in which contents of files that did not change since are remembered.
        """
        request = self.config.model_dump(mode="json", exclude={"source", "data_files"})
        if self.config.is_dataset:
            source = self.config.sources[0]
            request["dataset"] = [source, self._data_files()]
            if is_on_hub(source, self._data_files()):
                known = hashlib.sha256(json.dumps([source, self.config.revision]).encode()).hexdigest()[:32]
                commit = commit_of(source, self.config.revision, None if memory is None else memory / f"commit-{known}")
                request["revision"] = self._revision = commit or self.config.revision
        files = [(file.name, file.kind, file.rows) for file in self.files]
        content = content_digest(self.paths(), memory)
        return hashlib.sha256(json.dumps([request, files, content], sort_keys=True).encode()).hexdigest()

    def stamps(self) -> list[tuple]:
        """The same as long as nobody changes the files."""
        return stamps(self.paths())


def _validated(config: dict[str, Any]) -> CorpusConfig:
    """The checked config; what is wrong with a mapping becomes one line."""
    try:
        return CorpusConfig.model_validate(config)
    except ValidationError as error:
        faults = [
            ".".join(map(str, fault["loc"])) + ": " * bool(fault["loc"]) + fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()
        ]
        raise ValueError("corpus: " + "; ".join(faults)) from None
