"""Where text comes from: a `CorpusConfig` names a source, `Corpus` finds it and yields its documents in a fixed order.

Sources: text files, folders and globs, JSONL, Parquet, Hugging Face datasets (streamed), and `stdlib`, the source code
of the running Python's standard library. Nothing here knows of tokens. Everything is read in constant memory: a text
file of any length arrives in pieces.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megalodon.data.reading import TextFile, check_text, jsonl_texts, parquet_texts

SUFFIX_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

# Left out of `stdlib`: tests, other people's packages, generated tables and grammars, and programs that are no library.
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "ensurepip"}
    | {"encodings", "lib2to3", "pydoc_data", "idlelib", "turtledemo", "__phello__"}
)
STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


class CorpusConfig(BaseModel):
    """What to read. A plain mapping with these keys is enough wherever a corpus is asked for.

    With `kind: auto`, `stdlib` is the standard library and anything else a path, a folder (read recursively, hidden
    files left out) or a glob whose files are told apart by suffix: .jsonl and .ndjson, .parquet, and text for the rest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | list[str] = Field(
        description="`stdlib`, a file, a folder, a glob, a list of these, or a Hugging Face dataset's or builder's name"
    )
    kind: Literal["auto", "text", "jsonl", "parquet", "huggingface", "stdlib"] = "auto"
    field: str = Field(
        default="text", min_length=1, description="the field that holds the text, where rows have fields"
    )
    max_documents: int | None = Field(default=None, ge=1, description="read only this many documents")
    name: str | None = Field(default=None, description="Hugging Face: the dataset's configuration")
    split: str | None = Field(default=None, description="Hugging Face: the split; `train` when not given")
    revision: str | None = Field(default=None, description="Hugging Face: a branch, tag or commit")
    data_files: str | list[str] | None = Field(default=None, description="Hugging Face: files for a local builder")

    @model_validator(mode="after")
    def _consistent(self) -> CorpusConfig:
        sources = [self.source] if isinstance(self.source, str) else self.source
        if not sources or not all(entry.strip() for entry in sources):
            raise ValueError("source is empty: give `stdlib`, a file, a folder, a glob or a dataset's name")
        if self.kind == "huggingface":
            if len(sources) != 1:
                raise ValueError(f"source: kind huggingface reads one dataset, {len(sources)} were given")
        else:
            for key in ("name", "split", "revision", "data_files"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} only has a meaning with kind: huggingface, the kind given is {self.kind}")
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


@dataclass(frozen=True)
class Document:
    """One document: its origin's name, and its text in pieces. The pieces of a file can be iterated more than once."""

    name: str
    pieces: Iterable[str]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus as it was found: `name` is shown to people, size and time of change identify its content."""

    path: Path
    name: str
    kind: str
    size: int
    modified_ns: int


class Corpus:
    """A corpus that was found: its files are known, none has been read.

    Raises FileNotFoundError for a source that does not exist and ValueError for one without files. Iterating
    `documents()` raises ValueError for text that is not UTF-8 or holds NUL bytes, for rows that are not what they
    should be, and for a field that is missing, each naming the file and the row.
    """

    def __init__(self, config: CorpusConfig | dict[str, Any]) -> None:
        self.config = config if isinstance(config, CorpusConfig) else _validated(config)
        if self.config.kind == "huggingface":
            self.files: list[CorpusFile] = []
        elif self.config.is_stdlib:
            self.files = _stdlib_files()
        else:
            found = [file for source in self.config.sources for file in _find(source, self.config.kind)]
            self.files = list({file.path: file for file in found}.values())  # a file named twice is read once

    @property
    def total_bytes(self) -> int | None:
        """Size of all files, or None where it is not known before reading (a streamed dataset, or a limit on it)."""
        if self.config.kind == "huggingface" or self.config.max_documents is not None:
            return None
        return sum(file.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """The documents, always in the same order: sources as listed, files sorted by path, rows as they stand."""
        everything = _huggingface(self.config) if self.config.kind == "huggingface" else self._file_documents()
        return islice(everything, self.config.max_documents)

    def _file_documents(self) -> Iterator[Document]:
        for file in self.files:
            if file.kind == "text":
                yield Document(file.name, TextFile(file.path))
            else:
                rows = jsonl_texts if file.kind == "jsonl" else parquet_texts
                for origin, text in rows(file.path, self.config.field):
                    yield Document(origin, (text,))

    def fingerprint(self) -> str:
        """Identifies the content: the request, and each file's path, size and time of change. A Hugging Face dataset is
        known by its request alone, so give it a `revision` if it may change."""
        files = [(str(file.path.absolute()), file.kind, file.size, file.modified_ns) for file in self.files]
        if self.config.kind == "huggingface":
            files = [(str(path), "data", *_stamp(path)) for path in self._local_data_files()]
        request = self.config.model_dump(mode="json")
        return hashlib.sha256(json.dumps([request, files], sort_keys=True).encode()).hexdigest()

    def _local_data_files(self) -> list[Path]:
        listed = self.config.data_files or []
        patterns = [listed] if isinstance(listed, str) else listed
        return [Path(name).absolute() for pattern in patterns for name in _glob(pattern)]


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


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _find(source: str, kind: str) -> list[CorpusFile]:
    """The files a path, folder or glob stands for, sorted by path."""
    path = Path(source).expanduser()
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        visible = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        paths = sorted(p for p in visible if p.is_file())
        if kind in ("jsonl", "parquet"):
            paths = [p for p in paths if SUFFIX_KINDS.get(p.suffix.lower()) == kind]
        if not paths:
            wanted = "" if kind in ("auto", "text") else f"{kind} "
            raise ValueError(f"source {source!r}: the folder holds no {wanted}files")
    elif glob.has_magic(source):
        paths = [p for p in _glob(str(path)) if p.is_file()]
        if not paths:
            raise FileNotFoundError(f"source {source!r}: no file matches this glob (from folder {Path.cwd()})")
    else:
        raise FileNotFoundError(
            f"source {source!r}: no such file or folder (from folder {Path.cwd()}). Give a path, a glob, or `stdlib`; "
            "for a dataset on the Hugging Face hub add kind: huggingface"
        )
    return [
        CorpusFile(p, str(p), SUFFIX_KINDS.get(p.suffix.lower(), "text") if kind == "auto" else kind, *_stamp(p))
        for p in paths
    ]


def _glob(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute pattern


def _stdlib_files() -> list[CorpusFile]:
    """The .py files of the running Python's standard library, named by their path inside it, e.g. `json/decoder.py`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _skipped(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not _skipped(name)]
    files = [CorpusFile(path, path.relative_to(root).as_posix(), "text", *_stamp(path)) for path in sorted(found)]
    if not files:
        raise FileNotFoundError(
            f"source 'stdlib': this Python carries no library source at {root}: give a folder of text"
        )
    return files


def _skipped(name: str) -> bool:
    return name in STDLIB_SKIPPED_FOLDERS or name.startswith(STDLIB_SKIPPED_PREFIXES)


def _huggingface(config: CorpusConfig) -> Iterator[Document]:
    """Rows of a Hugging Face dataset, streamed. Also local files, through a builder: source json, data_files ..."""
    import datasets  # imported here because it takes a second and most runs never need it

    source, split = config.sources[0], config.split or "train"
    where = f"dataset {source!r}" + (f", name {config.name!r}" if config.name else "") + f", split {split!r}"
    try:
        rows = datasets.load_dataset(
            source, config.name, split=split, data_files=config.data_files, revision=config.revision, streaming=True
        )
        first = next(iter(rows), None)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where} cannot be read: {reason}. Check source, name, split and data_files") from error
    if first is not None and config.field not in first:
        raise ValueError(f"{where} has no field {config.field!r}: set field to one of {', '.join(sorted(first))}")
    label = "/".join(filter(None, (source, config.name, split)))
    for number, row in enumerate(rows):
        origin = f"{label}:{number}"
        yield Document(origin, (check_text(row.get(config.field), origin, config.field),))
