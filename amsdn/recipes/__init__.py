"""Named run configurations: plain functions that return a Recipe, one deriving from another."""

from collections.abc import Callable

from amsdn.errors import InputError
from amsdn.recipes.cifar10 import cifar10_certified, cifar10_cpu
from amsdn.recipes.cifar10_gpu import cifar10_allround, cifar10_patch_sparse, cifar10_smoothing, in_ten_minutes
from amsdn.recipes.digits import digits_demo
from amsdn.recipes.imagenet import imagenet
from amsdn.recipes.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits-demo": digits_demo,
    "cifar10-cpu": cifar10_cpu,
    "cifar10-certified": cifar10_certified,
    "cifar10-patch-sparse": cifar10_patch_sparse,
    "cifar10-patch-sparse-10min": lambda: in_ten_minutes(cifar10_patch_sparse()),
    "cifar10-smoothing": cifar10_smoothing,
    "cifar10-smoothing-10min": lambda: in_ten_minutes(cifar10_smoothing()),
    "cifar10-allround": cifar10_allround,
    "cifar10-allround-10min": lambda: in_ten_minutes(cifar10_allround()),
    "imagenet": imagenet,
}
DEFAULT = "digits-demo"


def get_recipe(name: str) -> Recipe:
    """The recipe of that name; raises InputError listing the names there are."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()


__all__ = ["DEFAULT", "RECIPES", "Recipe", "get_recipe"]
