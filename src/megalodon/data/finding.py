"""Finding the files of a corpus: paths, folders, globs, links, folders of `Dataset.save_to_disk`, the standard library.

Every file is found once, however many names lead to it. What a folder holds beside text of a known format is left out,
and told.
"""

from __future__ import annotations

import glob
import json
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalodon.data.formats import KNOWN, is_about_the_corpus, kind_of
from megalodon.data.rows import count_arrow_rows
from megalodon.data.slices import SplitPart, split_parts

# Left out of `stdlib`: tests, other people's packages, generated tables and grammars, and programs that are no library.
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "ensurepip"}
    | {"encodings", "lib2to3", "pydoc_data", "idlelib", "turtledemo", "__phello__"}
)
STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
NAMED = 5


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus as it was found: `name` is shown to people, `kind` says how it is read, and `rows` which of
    its rows, from the first up to, not including, the second; None for all."""

    path: Path
    name: str
    kind: str
    size: int
    rows: tuple[int, int] | None = None


@dataclass
class Found:
    """The files of the sources in their order, and what was left out of their folders, with the reason."""

    files: list[CorpusFile] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    _seen: set[tuple[int, int] | str] = field(default_factory=set)

    def add(self, paths: Iterable[Path], kind: str) -> None:
        """Take files, but for those that are here under another name already."""
        for path in paths:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(
                    f"source {str(path)!r} is a pipe or a device: it is read more than once, so give a file"
                )
            # Some network file systems number no files; there the path without links is what tells them apart.
            identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
            if identity not in self._seen:
                self._seen.add(identity)
                chosen = (kind_of(path) or "text") if kind == "auto" else kind
                self.files.append(CorpusFile(path, str(path), chosen, status.st_size))

    def take(self, files: Iterable[CorpusFile]) -> None:
        """Take the files of a dataset, but for those that are here already as files of one."""
        self.files += [file for file in files if file not in self.files]

    def told(self) -> str | None:
        """One sentence on what was left out; None where nothing was."""
        if not self.left_out:
            return None
        named = ", ".join(f"{name} ({reason})" for name, reason in self.left_out[:NAMED])
        more = f" and {len(self.left_out) - NAMED:,} more" if len(self.left_out) > NAMED else ""
        return f"left out: {named}{more}; name a file itself to have it read"


def find_files(sources: Iterable[str], kind: str, split: str | None) -> Found:
    """The files that paths, folders and globs stand for: sources as listed, files of each sorted by path.

    Raises FileNotFoundError for a source that does not exist, for a link to nothing and ValueError for one without
    files.
    """
    found = Found()
    for source in sources:
        _find(source, kind, split, found)
    return found


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return any(
        isinstance(_json(folder / name).get(key), list)
        for name, key in ((SAVED_SPLITS, "splits"), (SAVED_DATASET, "_data_files"))
    )


def saved_dataset(folder: Path, split: str | None) -> list[CorpusFile]:
    """The files of a saved dataset, or those that hold the rows of a split such as `train[:10%]+test`."""
    files = []
    for part in split_parts(split) if split is not None else [SplitPart(None)]:
        paths = saved_dataset_files(folder, part.name)
        sizes = [count_arrow_rows(path) for path in paths] if part.sliced else []
        first, stop = part.rows_of(sum(sizes)) if part.sliced else (0, 0)
        begin = 0
        for path, size in zip(paths, sizes or [0] * len(paths), strict=True):
            rows = (max(0, first - begin), min(size, stop - begin)) if part.sliced else None
            begin += size
            if rows is None or rows[0] < rows[1]:
                files.append(CorpusFile(path, str(path), "arrow", path.stat().st_size, rows))
    return files


def saved_dataset_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a saved dataset in its order; of a dictionary of splits those of `split`, or of `train`.

    Raises ValueError where the folder is not whole, or does not have the split.
    """
    if (folder / SAVED_SPLITS).is_file():
        splits = _json(folder / SAVED_SPLITS).get("splits", [])
        wanted = split or "train"
        if wanted not in splits:
            there = ", ".join(map(str, splits))
            raise ValueError(f"source {str(folder)!r} has no split {wanted!r}: set split to one of {there}")
        folder = folder / wanted
    elif split is not None and split != (saved := _json(folder / SAVED_DATASET).get("_split")):
        raise ValueError(
            f"source {str(folder)!r} has no split {split!r}: it is a saved dataset of one split"
            + (f", {saved!r}; leave split out" if saved else "; leave split out")
        )
    state = _json(folder / SAVED_DATASET)
    if "_data_files" not in state:
        raise ValueError(f"{folder}: its {SAVED_DATASET} is missing or damaged: copy the folder anew")
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder}: an indices file chooses its rows, as old versions of datasets did; save it again")
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder}: {file.name} is missing, which its {SAVED_DATASET} lists: copy the folder anew")
    return files


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _find(source: str, kind: str, split: str | None, found: Found) -> None:
    path = Path(source).expanduser()
    if path.is_dir():
        if kind in ("auto", "arrow") and is_saved_dataset(path):
            found.take(saved_dataset(path, split))
            return
        paths, left_out = _choose(path, kind)
        if not paths:
            wanted = f"no {kind} files" if kind not in ("auto", "text") else f"no files of a known format ({KNOWN})"
            there = f"; there are {', '.join(name for name, _ in left_out[:NAMED])}" if left_out else ""
            raise ValueError(f"source {source!r}: the folder holds {wanted}{there}")
        found.left_out += left_out
        found.add(paths, kind)
    elif os.path.lexists(path):
        if not path.exists():
            raise FileNotFoundError(f"source {source!r}: a link to nothing, {os.readlink(path)}")  # noqa: PTH115
        found.add([path], kind)
    elif glob.has_magic(source):
        matched = _matching(str(path))
        # `*.py` says which files are meant; `*` says no more than a folder does.
        named = Path(source).suffix not in ("", ".*") or not glob.has_magic(Path(source).name)
        paths = []
        for file in (p for p in matched if p.is_file()):
            reason = None if not glob.has_magic(Path(source).name) else _reason(file, "text" if named else kind)
            if reason is None:
                paths.append(file)
            else:
                found.left_out.append((str(file), reason))
        if not paths:
            raise FileNotFoundError(f"source {source!r}: no file matches this glob (from folder {Path.cwd()})")
        found.add(paths, kind)
    else:
        raise FileNotFoundError(
            f"source {source!r}: no such file or folder (from folder {Path.cwd()}). Give a path, a glob, or `stdlib`; "
            "for a dataset on the Hugging Face hub add kind: huggingface"
        )


def _choose(folder: Path, kind: str) -> tuple[list[Path], list[tuple[str, str]]]:
    """(files of the kind, what is left out) of everything in a folder, links followed, each sorted by path."""
    chosen, left_out = [], []
    for path in sorted(walk(folder)):
        if path.name.startswith("."):
            left_out.append((str(path), "hidden"))
            continue
        if not path.exists():
            raise FileNotFoundError(f"{path}: a link to nothing, {os.readlink(path)}: mend or remove it")  # noqa: PTH115
        reason = _reason(path, kind) if path.is_file() else "no file, but a pipe or the like"
        if reason is None:
            chosen.append(path)
        else:
            left_out.append((str(path), reason))
    return chosen, left_out


def _reason(path: Path, kind: str) -> str | None:
    """Why a file that was come upon, not named, is no part of a corpus of this kind; None if it is."""
    if is_about_the_corpus(path):
        return "about the corpus"
    if kind == "text":
        return None
    known = kind_of(path)
    if known is None:
        return "no known format"
    return None if kind in ("auto", known) else f"{known}, not {kind}"


def walk(folder: Path) -> Iterator[Path]:
    """Every file under a folder, and the hidden folders without what they hold. Links to folders are followed, each
    folder is entered once.

    Raises OSError for a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    entered = {os.path.realpath(folder)}
    for root, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        kept = []
        for name in sorted(subfolders):
            target = os.path.realpath(Path(root, name))
            if name.startswith("."):
                yield Path(root, name)
            elif target not in entered:
                entered.add(target)
                kept.append(name)
        subfolders[:] = kept
        # What a saved dataset computed beside its data is no data.
        if root != str(folder) and SAVED_DATASET in names and is_saved_dataset(Path(root)):
            listed = {path.name for path in saved_dataset_files(Path(root), None)}
            names = [name for name in names if name in listed or not name.endswith(".arrow")]
        yield from (Path(root, name) for name in names)


def _matching(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute pattern


def stdlib_files() -> Found:
    """The .py files of the running Python's standard library, named by their path inside it, e.g. `json/decoder.py`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _skipped(name)]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not _skipped(name)]
    if not found:
        raise FileNotFoundError(
            f"source 'stdlib': this Python carries no library source at {root}: give a folder of text"
        )
    sizes = ((path, path.stat().st_size) for path in sorted(found))
    return Found([CorpusFile(path, path.relative_to(root).as_posix(), "text", size) for path, size in sizes])


def _skipped(name: str) -> bool:
    return name in STDLIB_SKIPPED_FOLDERS or name.startswith(STDLIB_SKIPPED_PREFIXES)
