"""The policy for request fields, in one place: each is honoured, ignored because it cannot change the answer here, or
refused because it would change what is meant. `docs/make_fields.py` writes the table of docs/serving.md.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

BEGIN, END = "<!-- fields: made by docs/make_fields.py -->", "<!-- end of fields -->"
POLICIES = ("honoured", "ignored", "refused")


def ignored(why: str) -> Any:
    """A field that cannot change the answer here: anything is taken."""
    return Field(None, description=why, json_schema_extra={"policy": "ignored"})


def refused(why: str, *off: Any) -> Any:
    """The type of a field that is refused unless it is null or one of the values that ask for nothing (`off`)."""

    def check(value: Any) -> Any:
        if value is None or any(value == one and type(value) is type(one) for one in off):
            return value
        if isinstance(value, int | float) and any(
            isinstance(one, int | float) and not isinstance(one, bool) and value == one for one in off
        ):
            return value
        raise PydanticCustomError("refused", "{why}", {"why": f"it is not taken here: {why}. Leave it out"})

    said: dict[str, Any] = {"policy": "refused", "enum": [None, *off]}
    return Annotated[Any, BeforeValidator(check), Field(description=why, json_schema_extra=said)]


def policy_of(model: type[BaseModel], name: str) -> str:
    """The policy for a field of a request."""
    extra = model.model_fields[name].json_schema_extra
    if not isinstance(extra, dict):
        for part in model.model_fields[name].metadata:
            found = getattr(part, "json_schema_extra", None)
            extra = found if isinstance(found, dict) else extra
    return str(extra.get("policy", "honoured")) if isinstance(extra, dict) else "honoured"


def table(endpoints: dict[str, type[BaseModel]]) -> str:
    """All fields of requests as a Markdown table, by policy."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for endpoint, model in endpoints.items():
        for name, field in model.model_fields.items():
            key = (policy_of(model, name), name, field.description or "as OpenAI has it")
            rows.setdefault(key, []).append(endpoint)
    lines = ["| field | where | what becomes of it |", "|---|---|---|"]
    for (policy, name, said), where in sorted(rows.items(), key=lambda row: (POLICIES.index(row[0][0]), row[0][1])):
        shown = "all" if len(where) == len(endpoints) else ", ".join(where)
        lines.append(f"| `{name}` | {shown} | {policy}: {said} |")
    return "\n".join(lines)


def written_into(text: str, made: str) -> str:
    """A page with the table in its place.

    Raises:
        ValueError: if the page has no place for it.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page must have the lines {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"
