"""Rows of JSONL, JSON, CSV, Parquet and Arrow files, one at a time: their texts, and what is wrong with those that have
none.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from megalodon.data.formats import open_binary, open_seekable
from megalodon.data.reading import check_text

BLOCK = 1 << 18
MOST_NAMES, LONGEST_NAME = 20, 60
ROWS_AT_ONCE = 64  # of a columnar file; rows may be whole books

Row: TypeAlias = "tuple[str, Any]"
"""(origin such as `path:line`, the row: a mapping, or the ValueError that says what is wrong with it)."""


class MissingField(ValueError):
    """A row without the field that is asked for."""


def field_of(row: Any, field: str, origin: str) -> Any:
    """The value of a field, `meta.text` being `text` in `meta` where the row has no field of that whole name.

    Raises ValueError for a row that is no mapping, MissingField naming the fields there are.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{origin}: holds {type(row).__name__}, not a JSON object with a field {field!r}")
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            raise MissingField(f"{origin}: no field {field!r}: set field to one of {listed(field_names(row))}")
        value = value[part]
    return value


def field_names(row: dict[str, Any], prefix: str = "") -> list[str]:
    """The names that `field_of` knows, sorted, those of nested fields with dots."""
    names: list[str] = []
    for name, value in row.items():
        nested = field_names(value, f"{prefix}{name}.") if isinstance(value, dict) else []
        names += nested or [f"{prefix}{name}"]
    return sorted(names)


def listed(names: Sequence[str]) -> str:
    """Names for one line of a message: some of them, and each as far as a name goes."""
    shown = [name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..." for name in names[:MOST_NAMES]]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(shown) or "(none)").replace("\n", " ").replace("\r", " ") + more


def texts(rows: Iterable[Row], field: str, bad_row: Callable[[ValueError], None]) -> Iterator[tuple[str, str]]:
    """(origin, text) of each row that has one. `bad_row` is told of the others, and raises or does not."""
    for origin, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            text = check_text(field_of(row, field, origin), origin, field)
        except ValueError as error:
            bad_row(error)
            continue
        yield origin, text


def jsonl_rows(path: Path, field: str) -> Iterator[Row]:
    """Each line of a JSONL file; blank lines are passed over."""
    with open_binary(path) as stream:
        yield from _lines(stream, path)


def _lines(stream: Iterable[bytes], path: Path) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, origin: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # besides bad JSON and bad UTF-8, numbers too long for Python
        return ValueError(f"{origin}: not a JSON object on one line ({error})")


def json_rows(path: Path, field: str) -> Iterator[Row]:
    """The rows of a .json file: the objects of one array, objects one after another, or one a line."""
    with open_binary(path) as stream:
        first = _first_line(stream)
    if first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and not isinstance(_parsed(first, ""), ValueError):
        yield from jsonl_rows(path, field)
        return
    with open_binary(path) as stream:
        for number, row in enumerate(_values(stream, path)):
            yield f"{path}:{number}", row


def _first_line(stream: BinaryIO) -> bytes:
    for line in stream:
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            return line
    return b""


def _values(stream: BinaryIO, path: Path) -> Iterator[Any]:
    """The values of an array, or of a sequence of values, read with no more than one of them in memory."""
    reader = _Text(stream, path)
    scan = json.JSONDecoder().raw_decode
    in_array = reader.peek() == "["
    if in_array:
        reader.at += 1
    count = 0
    while (mark := reader.peek()) and not (in_array and mark == "]"):
        if in_array and count:
            if mark != ",":
                raise ValueError(f"{path}: not JSON: no comma after row {count - 1} of the array")
            reader.at += 1
            reader.peek()
        while True:
            try:
                value, end = scan(reader.text, reader.at)
                if end < len(reader.text) or not reader.more():
                    break
            except (ValueError, RecursionError) as error:
                if not reader.more():
                    reason = getattr(error, "msg", str(error) or type(error).__name__)
                    raise ValueError(f"{path}: not JSON: {reason} in row {count}") from None
        reader.at = end
        count += 1
        yield value
    if in_array:
        if mark != "]":
            raise ValueError(f"{path}: not JSON: the array is not closed, so the file is cut short")
        reader.at += 1
        if reader.peek():
            raise ValueError(f"{path}: not JSON: something follows the array of {count} rows, {reader.peek()!r} first")


class _Text:
    """Text of a stream from a moving place on."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self._ended = "", 0, False

    def more(self) -> bool:
        """Read on, as much again as is held, so that a long value is scanned a few times only; False at the end."""
        if self._ended:
            return False
        self.text, self.at = self.text[self.at :], 0
        block = self._stream.read(max(BLOCK, len(self.text)))
        try:
            self.text += self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: not UTF-8 ({error.reason})") from None
        self._ended = not block
        return bool(block)

    def peek(self) -> str:
        """The next character that is no white space, at which the reader then stands; empty at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""


def csv_rows(path: Path, field: str) -> Iterator[Row]:
    """The records of a CSV file (RFC 4180: commas, double quotes, a first line with the names of the fields)."""
    csv.field_size_limit(sys.maxsize)  # the library's 128 KiB are less than a long document
    with open_binary(path) as stream:
        reader = csv.reader(_csv_lines(stream), strict=True)
        try:
            names = next((record for record in reader if record), None)
        except csv.Error as error:
            raise ValueError(f"{path}:1: not CSV ({error})") from None
        if names is None:
            return
        if field not in names:
            raise ValueError(f"{path}: no field {field!r}: set field to one of {listed(names)}")
        _refuse_two(field, names, path)
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = ValueError(f"{path}:{line}: not CSV ({error})")
                if "end of data" in str(error):  # a quote that nothing closes takes in all the rows after it
                    raise problem from None
                yield f"{path}:{line}", problem
                continue
            if not record:
                continue
            if len(record) != len(names):
                counts = f"{len(record)} values for {len(names)} fields"
                yield f"{path}:{line}", ValueError(f"{path}:{line}: {counts}")
            else:
                yield f"{path}:{line}", dict(zip(names, record, strict=True))


def _csv_lines(stream: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(stream):
        # What is not UTF-8 becomes lone surrogates, which `check_text` refuses where they stand in the text.
        yield line.decode("utf-8-sig" if number == 0 else "utf-8", errors="surrogateescape")


def parquet_rows(path: Path, field: str) -> Iterator[Row]:
    """The rows of a Parquet file with the one field, read in batches."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_seekable(path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            column = _column(table.schema_arrow, field, path)
            number = 0
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
                yield from _batch_rows(batch, path, number)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:  # among them ArrowInvalid, a ValueError without the path
        raise _damaged(error, path, "Parquet") from None


def count_arrow_rows(path: Path) -> int:
    """Rows of an Arrow file, without reading their values."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as stream:
            return sum(batch.num_rows for batch in _arrow_batches(stream)[1])
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(error, path, "Arrow") from None


def arrow_rows(path: Path, field: str) -> Iterator[Row]:
    """The rows of an Arrow file: of the streaming format, which the datasets library writes, or the file format."""
    import pyarrow

    number = 0
    try:
        with open_seekable(path) as stream:
            schema, batches = _arrow_batches(stream)
            name = _column(schema, field, path)
            name = name if name in schema.names else name.partition(".")[0]
            for whole in batches:
                for start in range(0, whole.num_rows, ROWS_AT_ONCE):
                    batch = whole.slice(start, ROWS_AT_ONCE).select([name])
                    yield from _batch_rows(batch, path, number)
                    number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(error, path, "Arrow") from None


def _arrow_batches(stream: Any) -> tuple[Any, Iterable[Any]]:
    """(schema, batches) of a stream at its beginning, in either of the two formats."""
    import pyarrow.ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if not is_file:
        reader = pyarrow.ipc.open_stream(stream)
        return reader.schema, reader
    table = pyarrow.ipc.open_file(stream)
    return table.schema, (table.get_batch(i) for i in range(table.num_record_batches))


def _column(schema: Any, field: str, path: Path) -> str:
    """The field's name in the schema. Raises ValueError naming those there are."""
    import pyarrow

    if field in schema.names:
        _refuse_two(field, schema.names, path)
        return field
    owner: Any = schema
    for part in field.split("."):
        names = owner.names if owner is schema else [owner.field(i).name for i in range(owner.num_fields)]
        if part not in names:
            raise ValueError(f"{path}: no field {field!r}: set field to one of {listed(_schema_names(schema))}")
        owner = owner.field(part).type
        if not pyarrow.types.is_struct(owner):
            owner = pyarrow.struct([])
    return field


def _refuse_two(field: str, names: Sequence[str], path: Path) -> None:
    if names.count(field) > 1:
        raise ValueError(f"{path}: {names.count(field)} fields are called {field!r}: rename those that are not meant")


def _schema_names(schema: Iterable[Any], prefix: str = "") -> list[str]:
    import pyarrow

    names: list[str] = []
    for column in schema:
        if pyarrow.types.is_struct(column.type):
            nested = [column.type.field(i) for i in range(column.type.num_fields)]
            names += _schema_names(nested, f"{prefix}{column.name}.")
        else:
            names.append(prefix + column.name)
    return names


def _batch_rows(batch: Any, path: Path, first: int) -> Iterator[Row]:
    for number, row in enumerate(batch.to_pylist(), first):
        yield f"{path}:{number}", row


def _damaged(error: Exception, path: Path, what: str) -> Exception:
    """What Arrow says of a file that it cannot read; what the system says, as of a missing file, stays as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path}: not a readable {what} file ({reason})")


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "jsonl": jsonl_rows,
    "json": json_rows,
    "csv": csv_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}
"""How the files of each kind are read, from path and field; a file whose columns are known lacks the field at once."""
