"""A file with the loss of every token, for plots and tables of one's own."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megalodon.evaluation.perplexity import Losses

SUFFIXES = (".parquet", ".csv")


class TokensFile:
    """Writes one row a token as they come: `document` (its number), `position` in it, `token` (its id), `loss` (nats)
    and `bytes` of text (null where nobody can tell).

    Raises:
        ValueError: for a name that ends in neither .parquet nor .csv.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        if path.suffix not in SUFFIXES:
            raise ValueError(f"tokens file: {str(path)!r} must end in {' or '.join(SUFFIXES)}")
        columns = {"document": "int32", "position": "int64", "token": "int32", "loss": "float64", "bytes": "int32"}
        self._schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in columns.items()])
        path.parent.mkdir(parents=True, exist_ok=True)
        kind: Any = pyarrow.csv.CSVWriter if path.suffix == ".csv" else pyarrow.parquet.ParquetWriter
        self._writer = kind(path, self._schema)

    def add(self, document: int, losses: Losses) -> None:
        """Write the losses of a piece of a document."""
        import pyarrow

        n = len(losses.nats)
        sizes = pyarrow.nulls(n, pyarrow.int32()) if losses.sizes is None else losses.sizes.astype(np.int32)
        columns = [
            np.full(n, document, dtype=np.int32),
            np.arange(losses.first, losses.first + n, dtype=np.int64),
            losses.ids.astype(np.int32),
            losses.nats,
            sizes,
        ]
        self._writer.write_table(pyarrow.Table.from_arrays([pyarrow.array(c) for c in columns], schema=self._schema))

    def __enter__(self) -> TokensFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
