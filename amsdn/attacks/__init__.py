"""Attacks: each a frozen dataclass that stays in its threat model, counts its queries and adapts to what a defence declares."""

from amsdn.attacks.base import ActiveSet, Attack, AttackResult, Victim
from amsdn.attacks.compose import Cascade, Restarts
from amsdn.attacks.gradient_attacks import FGSM, PGDAttack, PGDL2Attack
from amsdn.attacks.losses import DLR, CrossEntropy, Goal, Loss, Margin
from amsdn.attacks.noise import RandomNoise
from amsdn.attacks.patch_attacks import PatchPGD
from amsdn.attacks.pixel_attacks import SparsePGD
from amsdn.attacks.registry import ATTACKS, make_attack
from amsdn.attacks.search_attacks import PatchRS, SparseRS

__all__ = [
    "ATTACKS",
    "DLR",
    "FGSM",
    "ActiveSet",
    "Attack",
    "AttackResult",
    "Cascade",
    "CrossEntropy",
    "Goal",
    "Loss",
    "Margin",
    "PGDAttack",
    "PGDL2Attack",
    "PatchPGD",
    "PatchRS",
    "RandomNoise",
    "Restarts",
    "SparsePGD",
    "SparseRS",
    "Victim",
    "make_attack",
]
