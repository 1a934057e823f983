"""The one list of recipes. A new one is a file here and a line in `RECIPES`."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from megalodon.linearize.recipe import Recipe

RECIPES: dict[str, str] = {
    "distill": "distill.Distill",
    "gecko": "gecko.Gecko",
    "hedgehog": "hedgehog.Hedgehog",
    "lizard": "lizard.Lizard",
    "lolcats": "lolcats.LoLCATs",
    "mohawk": "mohawk.Mohawk",
    "supra": "supra.Supra",
}
"""Name -> module of this folder and class."""


def recipe_of(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    if name not in RECIPES:
        near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, RECIPES, 1))
        raise ValueError(f"--recipe: there is no recipe {name!r}{near} (there are {', '.join(RECIPES)})")
    module, class_name = RECIPES[name].split(".")
    return getattr(import_module(f"{__name__}.{module}"), class_name)()
