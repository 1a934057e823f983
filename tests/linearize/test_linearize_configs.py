"""configs/linearize: what the demo is made of is possible."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalodon.linearize import RECIPES, read_config, recipe_of
from megalodon.training import count_parameters, load_config, resolve

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "linearize"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_the_demos_keys(name: str) -> None:
    config = read_config(recipe_of(name).config, FOLDER / "demo.yaml", [])
    assert (config.data.mode, config.data.sequence_length) == ("packed", 512)


def test_the_teacher_is_of_about_five_million_parameters() -> None:
    resolved = resolve(load_config(FOLDER / "teacher.yaml"), "teacher")
    assert 4e6 < count_parameters(resolved.model_config) < 6e6
