"""Surgery: a Plan and a model in, a smaller model out."""

from secateur.surgery.compensate import Compensator, compensator, compensators
from secateur.surgery.cut import mark_as_cut, mask, plan_of, prune, prune_, recipe_of
from secateur.surgery.recipe import Recipe

__all__ = [
    "Compensator",
    "Recipe",
    "compensator",
    "compensators",
    "mark_as_cut",
    "mask",
    "plan_of",
    "prune",
    "prune_",
    "recipe_of",
]
