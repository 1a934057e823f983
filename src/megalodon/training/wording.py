"""Pydantic's errors reworded: every problem in one message, each with its dotted key, what was given and what is
right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def describe_errors(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One sentence a problem: `optimizer.betas: ... (given: ...)`."""
    by_key: dict[tuple[str, ...], list[str]] = {}
    for details in error.errors(include_url=False):
        key = _key(details["loc"], schema)
        by_key.setdefault(key, []).append(_complaint(details, key, schema))
    # A value that fits no member of a union has one error for each member: they are one problem.
    return [f"{'.'.join(key)}: " * bool(key) + ", or ".join(dict.fromkeys(each)) for key, each in by_key.items()]


def one_message(where: str, problems: Sequence[str]) -> str:
    """The text of the one error that reports all the problems found in `where`."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in problems)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the known one most like it, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _key(location: Sequence[str | int], schema: type[BaseModel]) -> tuple[str, ...]:
    """The dotted key of an error: what pydantic adds to the location to tell a union's members is left out."""
    key: list[str] = []
    section: type[BaseModel] | None = schema
    for part in location:
        if section is None and not isinstance(part, int):
            break
        key.append(str(part))
        section = _subsection(section, str(part)) if section is not None else None
    return tuple(key)


def _subsection(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    if name not in section.model_fields:
        return None
    annotation = section.model_fields[name].annotation
    kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _complaint(details: Any, key: Sequence[str], schema: type[BaseModel]) -> str:
    if details["type"] == "extra_forbidden":
        for owner in key[:-1]:
            schema = _subsection(schema, owner) or schema
        return f"unknown key; {nearest(key[-1], schema.model_fields)}"
    if details["type"] == "missing":
        return "must be given"
    if details["type"] == "value_error":
        return str(details["msg"]).removeprefix("Value error, ")
    message = details["msg"]
    return f"{message[0].lower()}{message[1:]} (given: {details['input']!r})"
