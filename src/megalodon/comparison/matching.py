"""Models of one number of parameters: the width of each that comes nearest, found among all that make a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalodon.comparison.config import CompareConfig, Entry
from megalodon.data import load_tokenizer
from megalodon.models import Config
from megalodon.training.model_section import (
    architecture_of,
    count_parameters,
    given_fields,
    model_section,
    resolve_model,
)

UNIT = 8
"""Sizes are multiples of this, and the adjusted one is changed in steps of it."""
MOST = 1024
"""Widths that are tried, up to so many units."""


@dataclass(frozen=True)
class Matched:
    """An architecture's model section with its sizes found, its parameters, and the sizes that were chosen."""

    model: dict[str, Any]
    parameters: int
    sizes: dict[str, int]


def match_parameters(config: CompareConfig) -> dict[str, Matched]:
    """The models of a comparison, by architecture, all within `tolerance` of the same number of parameters.

    Raises:
        ValueError: naming the architecture whose sizes cannot be matched, and the nearest number that they reach.
    """
    tokenizer = load_tokenizer(config.train.get("tokenizer") or "bytes")

    def resolved(values: dict[str, Any]) -> Config:
        return resolve_model(model_section(architecture_of(values)).model_validate(values), tokenizer)

    wanted = config.parameters
    if wanted is None:
        first = next(iter(config.architectures.values()))
        wanted = count_parameters(resolved(first.model))
    found = {}
    for name, entry in config.architectures.items():
        best: Matched | None = None
        for candidate in _candidates(entry, wanted, resolved):
            if best is None or _error(candidate, wanted) < _error(best, wanted):
                best = candidate
        if best is None or _error(best, wanted) > config.tolerance:
            nearest = "none makes a model" if best is None else f"the nearest is {best.parameters:,} with {best.sizes}"
            raise ValueError(
                f"architectures.{name}: no sizes within {config.tolerance:.1%} of {wanted:,} parameters; {nearest}: "
                "change scale, adjust, the number of layers or heads, or tolerance"
            )
        found[name] = best
    return found


def _error(matched: Matched, wanted: int) -> float:
    return abs(matched.parameters / wanted - 1)


def _candidates(entry: Entry, wanted: int, resolved: Any) -> Iterator[Matched]:
    """The models of two widths about the wanted size, each as it scales and with the adjusted size changed."""
    start = resolved(entry.model)
    for name in (*entry.scale, *([entry.adjust] if entry.adjust else [])):
        if not isinstance(getattr(start, name, None), int):
            raise ValueError(f"scale or adjust names {name!r}: a {start.model_type} config has no such size")
    width = getattr(start, entry.scale[0])
    free = entry.adjust is not None and entry.adjust not in given_fields(_section(entry.model))

    def at(units: int, adjusted: int | None = None) -> Matched | None:
        sizes = {name: _scaled(getattr(start, name), units * UNIT / width) for name in entry.scale}
        if entry.adjust is not None and (adjusted is not None or not free):
            own = getattr(start, entry.adjust)
            sizes[entry.adjust] = adjusted if adjusted is not None else _scaled(own, units * UNIT / width)
        values = {**entry.model, **sizes}
        try:
            return Matched(values, count_parameters(resolved(values)), sizes)
        except ValueError:  # heads, groups or the like do not divide this width
            return None

    below = None
    for units in range(1, MOST):
        here = at(units)
        if here is None:
            continue
        for each in (below, here) if here.parameters >= wanted else ():
            if each is not None:
                yield each
                yield from _adjusted(each, entry, wanted, resolved, at)
        if here.parameters >= wanted:
            return
        below = here


def _adjusted(each: Matched, entry: Entry, wanted: int, resolved: Any, at: Any) -> Iterator[Matched]:
    """The same width with the adjusted size where the parameters are nearest; they are linear in it."""
    if entry.adjust is None:
        return
    units = each.sizes[entry.scale[0]] // UNIT
    own = getattr(resolved(each.model), entry.adjust)
    more = at(units, own + UNIT)
    if more is None or more.parameters == each.parameters:
        return
    steps = round((wanted - each.parameters) / (more.parameters - each.parameters))
    if steps and own + steps * UNIT >= UNIT:
        changed = at(units, own + steps * UNIT)
        if changed is not None:
            yield changed


def _section(values: dict[str, Any]) -> Any:
    return model_section(architecture_of(values)).model_validate(values)


def _scaled(size: int, ratio: float) -> int:
    return max(UNIT, round(size * ratio / UNIT) * UNIT)
