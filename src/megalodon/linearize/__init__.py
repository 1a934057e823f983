"""Linearisation: a pretrained Transformer in, a model that keeps its weights and loses its cache out."""

from megalodon.linearize.config import LinearizeConfig, read_config
from megalodon.linearize.recipe import Batchwise, FineTune, Lesson, Recipe, Stage, Transfer
from megalodon.linearize.recipes import RECIPES, recipe_of
from megalodon.linearize.run import Linearization, linearize, plan

__all__ = [
    "RECIPES",
    "Batchwise",
    "FineTune",
    "Lesson",
    "Linearization",
    "LinearizeConfig",
    "Recipe",
    "Stage",
    "Transfer",
    "linearize",
    "plan",
    "read_config",
    "recipe_of",
]
