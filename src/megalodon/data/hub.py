"""Datasets of the Hugging Face hub, and those that the datasets library builds from local files: rows, streamed.

What is read is known by its content: local files by their bytes, a dataset on the hub by the commit that its revision
stands for.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megalodon.data.finding import walk
from megalodon.data.rows import Row, field_names, field_of, listed
from megalodon.data.slices import SplitPart, split_parts


def local_files(source: str, data_files: list[str]) -> list[Path]:
    """The files on this machine that a dataset is made of, sorted; none for a dataset on the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not data_files:
        return sorted(path for path in walk(folder) if path.is_file())
    root = folder if folder.is_dir() else Path.cwd()
    patterns = [str(root / Path(pattern).expanduser()) for pattern in data_files]
    return sorted(
        Path(name)
        for pattern in patterns
        for name in glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        if Path(name).is_file()
    )


def is_on_hub(source: str, data_files: list[str]) -> bool:
    """Whether a name is that of a repository on the hub: no folder here, and no builder that is given its files."""
    return not Path(source).expanduser().exists() and not (data_files and "/" not in source)


def commit_of(source: str, revision: str | None, memory: Path | None) -> str | None:
    """The commit that a revision of a dataset on the hub stands for now.

    Without a connection it is the one that `memory`, a file, holds from the last time; None where there is none either.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        commit = HfApi().dataset_info(source, revision=revision, timeout=30).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError):
        return memory.read_text().strip() or None if memory is not None and memory.is_file() else None
    if memory is not None and commit:
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(commit)
    return commit


class HubRows:
    """The rows of a dataset, each with its origin `source/name/split:number`.

    Raises ValueError, in one line, for what cannot be read and for a field that the first row does not have.
    """

    def __init__(self, source: str, name: str | None, split: str | None, field: str, **options: Any) -> None:
        self.source, self.name, self.field, self.options = source, name, field, options
        self.parts = split_parts(split or "train")

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            yield from self._rows(part)

    def _rows(self, part: SplitPart) -> Iterator[Row]:
        import datasets  # imported here because it takes a second and most runs never need it

        where = f"dataset {self.source!r}" + (f", name {self.name!r}" if self.name else "") + f", split {part.name!r}"
        unreadable = (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetGenerationError)

        def refused(error: Exception) -> ValueError:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return ValueError(f"{where} cannot be read: {reason}. Check source, name, split and data_files")

        try:
            rows = datasets.load_dataset(self.source, self.name, split=part.name, streaming=True, **self.options)
            head = next(iter(rows), None)
        except unreadable as error:
            raise refused(error) from error
        if head is not None:
            try:
                field_of(head, self.field, where)
            except ValueError:
                if self.field.partition(".")[0] not in head:
                    raise ValueError(
                        f"{where} has no field {self.field!r}: set field to one of {listed(field_names(head))}"
                    ) from None
        label = "/".join(filter(None, (self.source, self.name, part.name)))
        first, stop = part.rows(self._length(rows, part) if part.needs_length else None)
        number, chosen = first - 1, islice(rows, first, stop)
        while True:
            try:
                row = next(chosen)
            except StopIteration:
                break
            except unreadable as error:
                raise refused(error) from error
            number += 1
            yield f"{label}:{number}", row
        if part.sliced and (number < first or (stop is not None and number + 1 < stop)):
            raise ValueError(f"split {part}: there is no such slice, {where} has {number + 1:,} rows or fewer")

    def _length(self, rows: Any, part: SplitPart) -> int:
        """Rows of a split: as the hub says for a dataset there, else counted."""
        known = (rows.info.splits or {}).get(part.name)
        if known is not None and known.num_examples and not Path(self.source).expanduser().exists():
            return int(known.num_examples)
        return sum(1 for _ in rows)
