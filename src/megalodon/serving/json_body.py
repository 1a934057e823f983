"""JSON bodies of any allowed size, read without holding up the event loop and in memory bounded by their own size.

A body of 16 MB can hold eight million values, each of which would be an object of its own, and reading it in one call
would keep every other thread from running. So a body is first scanned, 64 KiB at a time, for where its strings and
lists are. Long strings and lists of numbers are taken out and read piece by piece; of all other values there may be
`MOST_VALUES`, counted before any of them is made. What is wrong is one error, which names the field.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from json import scanner
from typing import Any, TypeAlias

import numpy as np

from megalodon.serving.errors import ApiError
from megalodon.serving.texts import LongText, Numbers, wrong_number

Raw: TypeAlias = bytes | bytearray
MOST_VALUES = 1 << 16
"""Members of lists and objects that a body may have, those of long lists of numbers not counted."""
MOST_DEPTH = 64
MOST_LEFT = 1 << 21
"""Bytes of what is read as a whole when long strings and lists of numbers have been taken out."""
PIECE = 1 << 16
"""Bytes that one call of the interpreter works on; the others run in between."""
BREATH = 1e-4
"""Seconds between two pieces: who waits for the interpreter gets it now, not when this thread's turn is over."""
SHORT = 64
"""Strings of so many bytes stay in the JSON that is read as a whole."""
FEW = 16
"""Likewise lists of numbers with so many commas."""
MOST_DIGITS = 4300
"""As Python has it for whole numbers."""
BOM = b"\xef\xbb\xbf"

_KINDS = np.zeros(256, np.uint8)  # of bytes outside strings: 1 is a mark, 2 a comma
_KINDS[list(b"[]{}:")] = 1
_KINDS[ord(",")] = 2
_DEPTH = np.zeros(256, np.int8)
_DEPTH[list(b"[{")] = 1
_DEPTH[list(b"]}")] = -1
_VALUES = np.zeros(256, np.uint8)  # marks that make a value of their own
_VALUES[list(b"[{:")] = 1
_QUOTE, _OPEN, _CLOSE, _COLON = b'"'[0], b"["[0], b"]"[0], b":"[0]
_LONG_NUMBER = re.compile(rb"(?<![-+.0-9eE])[-+.0-9eE]{%d}" % (MOST_DIGITS + 1))  # tried once a number
_WHOLE_ESCAPES = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*+"
)


def parse(body: Raw) -> dict[str, Any]:
    """The object in a JSON body. Strings of more than `PIECE` bytes are `LongText`, long lists of numbers `Numbers`.

    Must run in a thread: it takes up to a second for 16 MB, and lets others run every few milliseconds.

    Raises:
        ApiError: 400 for what is no JSON object in UTF-8, is nested too deep or has too many values.
    """
    start = len(BOM) if body.startswith(BOM) else 0
    marks = _scan(body, start)
    marks.check(body)
    nonce = secrets.token_hex(16)  # nobody can guess it, so it is not in the body
    taken: list[Any] = []
    try:
        written = _reduced(body, start, marks, nonce, taken).decode()
        value = _Decoder(nonce, taken).decode(written)
    except UnicodeDecodeError as error:
        raise _not_json(f"it is not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise _not_json(error.msg) from None
    except (ValueError, RecursionError) as error:
        raise _not_json(str(error)[:200]) from None
    if not isinstance(value, dict):
        raise ApiError(400, "body: a JSON object is expected", "invalid_value", "body")
    return value


def _not_json(why: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {why}", "invalid_json", "body")


class _Decoder(json.JSONDecoder):
    """The standard library's decoder in its form written in Python, so that other threads run while it works."""

    def __init__(self, nonce: str, taken: list[Any]) -> None:
        def put_back(found: dict[str, Any]) -> Any:
            return taken[found[nonce]] if nonce in found else found

        super().__init__(object_hook=put_back)
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]


@dataclass
class _Marks:
    """Where quotes, brackets, braces and colons are, and how many commas before each.

    Attributes:
        places: int32 [n], bytes from the beginning. kinds: uint8 [n]. commas: int32 [n].
        total: commas in all. whole: False if there were too many marks to go on.
    """

    places: np.ndarray
    kinds: np.ndarray
    commas: np.ndarray
    total: int
    whole: bool

    def flat(self) -> np.ndarray:
        """Indices of the brackets that open a list of many numbers: nothing but commas up to the closing one."""
        opens = (self.kinds[:-1] == _OPEN) & (self.kinds[1:] == _CLOSE)
        return np.flatnonzero(opens & (np.diff(self.commas) > FEW))

    def check(self, body: Raw) -> None:
        """Raise ApiError for too many values, or too deep ones."""
        depth = np.cumsum(_DEPTH[self.kinds], dtype=np.int32)
        if depth.max(initial=0) > MOST_DEPTH:
            message = f"it is nested deeper than {MOST_DEPTH} levels"
            raise ApiError(400, f"body: {message}", "invalid_value", self._field(body, depth, int(depth.argmax())))
        values = np.diff(self.commas, append=np.int32(self.total))  # after each mark, before the next
        values += _VALUES[self.kinds]
        flat = self.flat()
        values[flat] = 1
        if self.whole and values.sum() <= MOST_VALUES:
            return
        tops = np.flatnonzero((self.kinds == _COLON) & (depth == 1))
        field = "body"
        if len(tops):
            counts = np.add.reduceat(values, tops)
            field = self._field(body, depth, int(tops[counts.argmax()])) or field
        message = f"{field}: more than {MOST_VALUES:,} values, the most that are accepted"
        raise ApiError(400, message, "too_many_values", field)

    def _field(self, body: Raw, depth: np.ndarray, mark: int) -> str | None:
        """The field of the outermost object in which a mark is."""
        tops = np.flatnonzero((self.kinds[: mark + 1] == _COLON) & (depth[: mark + 1] == 1))
        if not len(tops) or tops[-1] < 2:
            return None
        begin, end = (int(self.places[tops[-1] - back]) for back in (2, 1))
        return body[begin + 1 : min(end, begin + 81)].decode(errors="replace")


def _scan(body: Raw, start: int) -> _Marks:
    places, kinds, commas = [], [], []
    values = strings = total = escapes = 0
    inside = np.uint8(0)
    for begin in range(start, len(body), PIECE):
        part = np.frombuffer(body, np.uint8, min(PIECE, len(body) - begin), begin)
        escaped, escapes = _escaped(part, escapes)
        quotes = (part == _QUOTE) & ~escaped
        within = np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ inside
        inside = within[-1]
        kind = np.where(within, 0, _KINDS[part])
        where = np.flatnonzero(quotes | (kind == 1))
        counted = np.cumsum(kind == 2)
        places.append((where + begin).astype(np.int32))
        kinds.append(part[where])
        commas.append((counted[where] + total).astype(np.int32))
        total += int(counted[-1])
        strings += int(np.count_nonzero(quotes))
        values += int(np.count_nonzero(_VALUES[kinds[-1]]))
        if values > MOST_VALUES or strings > 2 * MOST_VALUES:
            break
    whole = values <= MOST_VALUES and strings <= 2 * MOST_VALUES
    joined = [
        np.concatenate([np.array([], kind), *parts])
        for kind, parts in ((np.int32, places), (np.uint8, kinds), (np.int32, commas))
    ]
    return _Marks(joined[0], joined[1], joined[2], total, whole)


def _escaped(part: np.ndarray, before: int) -> tuple[np.ndarray, int]:
    """Which bytes follow an odd number of backslashes, and how many the part ends with; `before` of them precede it."""
    backslash = part == ord("\\")
    escaped = np.zeros(len(part), bool)
    if not before and not backslash.any():
        return escaped, 0
    place = np.arange(len(part))
    last = np.maximum.accumulate(np.where(backslash, -1, place))
    run = place - last + np.where(last == -1, before, 0)
    escaped[0] = before % 2
    escaped[1:] = run[:-1] % 2
    return escaped, int(run[-1])


def _reduced(body: Raw, start: int, marks: _Marks, nonce: str, taken: list[Any]) -> bytes:
    """The body with objects that number what was `taken` in the place of strings and lists of numbers."""
    spans = list(_spans(marks))
    left = len(body) - start - sum(end - begin for begin, end, _ in spans)
    if left > MOST_LEFT:
        message = f"body: more than {MOST_LEFT:,} bytes of names, numbers, short strings and white space"
        raise ApiError(400, message, "too_many_values", "body")
    pieces, done, room = [], start, MOST_VALUES
    for begin, end, is_text in spans:
        what = _text(body, begin + 1, end) if is_text else _numbers(body, begin + 1, end, room)
        room -= len(what) if isinstance(what, list) else 0
        _check_scalars(body, done, begin)
        pieces += [body[done:begin], b'{"%s":%d}' % (nonce.encode(), len(taken))]
        taken.append(what)
        done = end + 1
    _check_scalars(body, done, len(body))
    pieces.append(body[done:])
    return b"".join(pieces)


def _check_scalars(body: Raw, begin: int, end: int) -> None:
    """Raise ValueError for a number of so many digits that to read it would take long."""
    if end - begin <= PIECE:
        return
    for place in range(begin, end, PIECE):
        if _LONG_NUMBER.search(body, max(begin, place - MOST_DIGITS - 1), min(place + PIECE, end)):
            raise ValueError(f"a number has more than {MOST_DIGITS:,} digits")
        time.sleep(BREATH)


def _spans(marks: _Marks) -> Iterator[tuple[int, int, bool]]:
    """(place of the opening quote or bracket, of the closing one, whether it is a string) of what is taken out."""
    kinds, places = marks.kinds, marks.places
    quotes = np.flatnonzero(kinds == _QUOTE)
    opening = quotes[: len(quotes) // 2 * 2 : 2]
    is_name = np.append(kinds[2:], np.zeros(2, np.uint8))[opening] == _COLON
    sizes = places[opening + 1] - places[opening]
    if sizes[is_name].max(initial=0) > PIECE:
        raise ApiError(400, f"body: a field's name has more than {PIECE:,} bytes", "invalid_value", "body")
    if len(quotes) % 2:
        raise ValueError("a string has no end")
    opening = opening[(sizes > SHORT) & ~is_name]
    flat = marks.flat()
    taken = np.concatenate([opening, flat])
    is_text = np.arange(len(taken)) < len(opening)
    for i in np.argsort(taken, kind="stable"):
        mark = int(taken[i])
        yield int(places[mark]), int(places[mark + 1]), bool(is_text[i])


def _text(body: Raw, begin: int, end: int) -> str | LongText:
    if end - begin <= PIECE:
        text: str = json.loads(b'"' + body[begin:end] + b'"')
        return text
    pieces: list[bytes] = []
    while begin < end:
        stop = min(begin + PIECE, end)
        match = _WHOLE_ESCAPES.match(body, begin, stop)
        assert match is not None
        cut = match.end()
        while cut < end and cut > begin and body[cut] & 0xC0 == 0x80:
            cut -= 1
        if cut == begin:
            raise ValueError("a string has an escape that stands for no character")
        pieces.append(json.loads(b'"' + body[begin:cut] + b'"').encode())
        begin = cut
        time.sleep(BREATH)
    return LongText(pieces)


def _numbers(body: Raw, begin: int, end: int, room: int) -> Numbers | list[Any]:
    """A list without strings: `Numbers`, or as it is if it has others than integers, and at most `room` of them."""
    whole = end - begin <= PIECE
    parts: list[np.ndarray] = []
    count = 0
    while begin < end:
        cut = end if end - begin <= PIECE else body.rfind(b",", begin, begin + PIECE)
        if cut < 0:
            raise ValueError(f"a list has an element of more than {PIECE} bytes")
        values = json.loads(b"[" + body[begin:cut] + b"]")
        if not values:
            raise ValueError("Expecting value")
        wrong = wrong_number(values, count)
        if wrong is not None and whole and len(values) <= room:
            return values  # such as the fractions that a schema allows
        if wrong is not None:
            return Numbers(np.array([], np.int64), wrong)
        small = min(values) >= -(2**31) and max(values) < 2**31
        parts.append(np.array(values, dtype=np.int32 if small else np.int64))
        count += len(values)
        begin = cut + 1
        time.sleep(BREATH)
    joined = np.empty(count, np.result_type(*(part.dtype for part in parts)))
    parts.reverse()
    count = 0
    while parts:  # piece by piece: new memory is slow to write to, and nobody else runs meanwhile
        part = parts.pop()
        joined[count : count + len(part)] = part
        count += len(part)
    return Numbers(joined)
