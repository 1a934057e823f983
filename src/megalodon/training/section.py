"""What every section of a training config shares: unknown keys are errors, and each field says whether it may change
when a run is resumed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

CHANGEABLE = "may_change_on_resume"


class Section(BaseModel):
    """One section of the config: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def changeable(default: Any, **constraints: Any) -> Any:
    """A pydantic field whose value a resumed run may change, because the trained weights do not depend on it."""
    return Field(default, json_schema_extra={CHANGEABLE: True}, **constraints)
