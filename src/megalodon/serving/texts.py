"""Texts and token ids in requests: types for schemas, which hold long ones compactly and report one error.

A pydantic list of a million wrong numbers makes a million errors; these make one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeAlias

import numpy as np
from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

MOST_PROMPTS = 2048
MOST_PLAIN = 4096
"""Numbers of one list in a `Plain` value."""
MOST_PLAIN_BYTES = 1 << 20
"""UTF-8 bytes of one string in a `Plain` value."""


class LongText:
    """A text as pieces of UTF-8, none of which cuts a character: what a JSON string that is long becomes.

    A string in the interpreter's own form can be four times as large. Schemas take it wherever they take a `Text`.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self.nbytes = sum(map(len, pieces))

    def __iter__(self) -> Iterator[str]:
        return (piece.decode() for piece in self._pieces)

    def __str__(self) -> str:
        return "".join(self)

    def __repr__(self) -> str:
        return f"a text of {self.nbytes:,} bytes"

    def __contains__(self, character: str) -> bool:
        return any(character.encode() in piece for piece in self._pieces)


class Numbers:
    """A list of many numbers: int64 `values`, or what is `wrong` with them as token ids (which one, and why)."""

    def __init__(self, values: np.ndarray, wrong: str | None = None) -> None:
        self.values, self.wrong = values, wrong

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return "a list of many numbers"


class _Text:
    """A JSON string."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._check)

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string"}

    @staticmethod
    def _check(value: Any) -> str | LongText:
        if not isinstance(value, str | LongText):
            raise PydanticCustomError("string_type", "Input should be a valid string")
        if "\0" in value:
            raise PydanticCustomError("nul", "it holds a NUL character, which cannot be part of a text")
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("surrogate", "it holds half of a surrogate pair, which is no character") from None
        return value


class _TokenIds:
    """A list of token ids."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._check)

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}

    @staticmethod
    def _check(value: Any) -> np.ndarray:
        wrong: str | None = None
        if isinstance(value, Numbers):
            ids, wrong = value.values, value.wrong
        elif isinstance(value, list):
            wrong = wrong_number(value, 0)
            ids = np.array([] if wrong else value, dtype=np.int64)
        else:
            raise PydanticCustomError("list_type", "Input should be a list of token ids")
        if wrong is None and not len(ids):
            wrong = "the list is empty; give at least one token id"
        elif wrong is None and not 0 <= ids.min() <= ids.max() < 2**31:
            place = int(np.flatnonzero((ids < 0) | (ids >= 2**31))[0])
            wrong = f"element {place} is {ids[place]}, which is no token id"
        if wrong is not None:
            raise PydanticCustomError("token_ids", "{wrong}", {"wrong": wrong})
        return ids.astype(np.int32, copy=False)


def plain(value: Any) -> Any:
    """A value read by `json_body.parse` in the interpreter's own types.

    Raises:
        PydanticCustomError: for a string of more than `MOST_PLAIN_BYTES`, or a list of more than `MOST_PLAIN` numbers.
    """
    match value:
        case LongText():
            return str(short(value))
        case Numbers():
            if value.wrong is not None or len(value) > MOST_PLAIN:
                raise PydanticCustomError("too_long", f"a list has more than {MOST_PLAIN:,} numbers, the most here")
            return value.values.tolist()
        case dict():
            return {key: plain(one) for key, one in value.items()}
        case list():
            return [plain(one) for one in value]
    return value


def short(value: Any) -> Any:
    """A text that will be held and sent whole; see `MOST_PLAIN_BYTES`.

    Raises:
        PydanticCustomError: for a longer one.
    """
    if isinstance(value, LongText) and value.nbytes > MOST_PLAIN_BYTES:
        raise PydanticCustomError("too_long", f"a text has more than {MOST_PLAIN_BYTES:,} bytes, the most here")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number, not true or false")
    return value


NUMBER = BeforeValidator(_number)
"""Of a field that holds a number: `true` is none, although Pydantic takes it for 1."""
PLAIN = BeforeValidator(plain)
"""Of a field that libraries read, or that is written again: they know no `LongText`."""
Object: TypeAlias = Annotated[dict[str, Any], PLAIN]
Written: TypeAlias = Annotated[str, PLAIN]


def at_most(most: int) -> BeforeValidator:
    """Looks at how many members there are before each is looked at: all may be wrong, and each would be an error."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"it has {len(value):,} members; {most:,} is the most that is accepted")
        return value

    return BeforeValidator(check)


class _Prompts:
    """A text, token ids, or a list of up to `MOST_PROMPTS` of either."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._check)

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        text, ids = {"type": "string"}, _TokenIds.__get_pydantic_json_schema__(None, handler)
        several = {"type": "array", "minItems": 1, "maxItems": MOST_PROMPTS}
        return {"anyOf": [text, ids, {**several, "items": text}, {**several, "items": ids}]}

    @staticmethod
    def _check(value: Any) -> list[Prompt]:
        if isinstance(value, str | LongText):
            return [_Text._check(value)]
        if isinstance(value, Numbers):
            return [_TokenIds._check(value)]
        if not isinstance(value, list) or not value or len(value) > MOST_PROMPTS:
            wanted = f"Input should be a string, a list of token ids, or a list of 1 to {MOST_PROMPTS:,} of either"
            raise PydanticCustomError("prompts", "{wanted}", {"wanted": wanted})
        if isinstance(value[0], int | float):
            return [_TokenIds._check(value)]
        check = _Text._check if isinstance(value[0], str | LongText) else _TokenIds._check
        return [check(one) for one in value]


Text: TypeAlias = Annotated[str | LongText, _Text]
"""For schemas: a JSON string."""
TokenIds: TypeAlias = Annotated[np.ndarray, _TokenIds]
"""For schemas: a list of token ids, as an int32 array."""
Prompt: TypeAlias = str | LongText | np.ndarray
Prompts: TypeAlias = Annotated[list[Prompt], _Prompts]
"""For schemas: a text, token ids, or a list of up to `MOST_PROMPTS` of either."""


def wrong_number(values: Sequence[Any], before: int) -> str | None:
    """What is wrong with a list of integers whose first element is number `before`, or None."""
    if set(map(type, values)) == {int} and min(values) >= -(2**63) and max(values) < 2**63:
        return None
    for place, value in enumerate(values, before):
        if type(value) is not int:
            shown = json.dumps(value)[:40] if not isinstance(value, list | dict | LongText | Numbers) else "no number"
            return f"element {place} is {shown}, which is no token id"
        if not -(2**63) <= value < 2**63:
            return f"element {place} is {str(value)[:40]}, which is no token id"
    return None
