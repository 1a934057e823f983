"""`results.jsonl`: one record a job, appended as it is finished, whole after a kill at any instant."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megalodon.files import write_text
from megalodon.training.metrics import read_lines


class ResultsFile:
    """The records of a comparison by key. Opening drops a line that a kill cut short; only one process may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = read_lines(path) if path.exists() else []
        self.records: dict[str, dict[str, Any]] = {record["key"]: record for record in found}
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records.values()))

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is on the disk when this returns.

        Raises:
            ValueError: for a number that is not finite, which is no JSON.
        """
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The records in a file, by key, without changing it."""
    return {record["key"]: record for record in read_lines(path)}
