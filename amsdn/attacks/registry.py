"""Every attack by its name. A test suite runs over all of them, so a new entry is tested unasked."""

from collections.abc import Callable
from functools import partial
from typing import Any

from amsdn.attacks.base import Attack
from amsdn.attacks.gradient_attacks import FGSM, PGDAttack, PGDL2Attack
from amsdn.attacks.noise import RandomNoise
from amsdn.attacks.patch_attacks import PatchPGD
from amsdn.attacks.pixel_attacks import SparsePGD
from amsdn.attacks.search_attacks import PatchRS, SparseRS
from amsdn.errors import InputError

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "pgd": PGDAttack,
    "pgd-l2": PGDL2Attack,
    "patch-pgd": PatchPGD,
    "patch-rs": PatchRS,
    "sparse-pgd": SparsePGD,
    "sparse-pgd-projected": partial(SparsePGD, projected=True),
    "sparse-rs": SparseRS,
    "noise": RandomNoise,
}


def make_attack(name: str, **settings: Any) -> Attack:
    """The named attack with the given settings over its defaults. Raises InputError for an unknown name or setting."""
    if name not in ATTACKS:
        raise InputError(f"unknown attack {name!r}; known: {', '.join(ATTACKS)}")
    try:
        return ATTACKS[name](**settings)
    except TypeError as e:
        raise InputError(f"attack {name}: {e}; see the fields of the attack's class") from e
