"""Named run configurations: plain functions that return a Recipe, one deriving from another."""

from collections.abc import Callable

from amsdn.errors import InputError
from amsdn.recipes.cifar10 import cifar10_certified, cifar10_cpu
from amsdn.recipes.digits import digits_demo
from amsdn.recipes.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits-demo": digits_demo,
    "cifar10-cpu": cifar10_cpu,
    "cifar10-certified": cifar10_certified,
}
DEFAULT = "digits-demo"


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; raises InputError listing the names there are."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()


__all__ = ["DEFAULT", "RECIPES", "Recipe", "get_recipe"]
