"""Attacks: each a frozen dataclass that stays in its threat model, counts its queries and adapts to what a defence declares."""

from amsdn.attacks.apgd import (
    APGDAttack,
    APGDL1Attack,
    APGDL2Attack,
    APGDTargetedAttack,
    APGDTargetedL1Attack,
    APGDTargetedL2Attack,
)
from amsdn.attacks.base import ActiveSet, Attack, AttackResult, Victim
from amsdn.attacks.carlini_wagner import CWL2
from amsdn.attacks.compose import Cascade, Restarts
from amsdn.attacks.deepfool import DeepFool
from amsdn.attacks.detector_evasion import EvadeDetector
from amsdn.attacks.fab import FABAttack, FABL1Attack, FABL2Attack, FABTargetedAttack, FABTargetedL1Attack, FABTargetedL2Attack
from amsdn.attacks.few_pixel import FewPixelDE
from amsdn.attacks.gradient_attacks import FGSM, MIFGSM, NFGSM, PGDAttack, PGDL1Attack, PGDL2Attack
from amsdn.attacks.guided_search import GuidedSparseRS
from amsdn.attacks.hidden_view import HiddenViewPatch
from amsdn.attacks.lavan import LaVAN
from amsdn.attacks.losses import DLR, CrossEntropy, Goal, Loss, Margin
from amsdn.attacks.masking_aware import MaskingAwarePatch
from amsdn.attacks.minimal_norm import MinimalNorm
from amsdn.attacks.noise import RandomNoise
from amsdn.attacks.patch_attacks import PatchPGD
from amsdn.attacks.patch_search import PatchRS
from amsdn.attacks.pixel_attacks import SparsePGD
from amsdn.attacks.registry import ATTACKS, make_attack
from amsdn.attacks.search_attacks import SparseRS
from amsdn.attacks.sigma_zero import SigmaZero
from amsdn.attacks.square_attack import SquareAttack, SquareL2Attack
from amsdn.attacks.suites import AutoAttack, AutoAttackL1, AutoAttackL2, PatchAutoAttack, SparseAutoAttack
from amsdn.attacks.targeting import Targeted
from amsdn.attacks.universal_patch import AdvPatch, ApplyPatch, UniversalPatch, success_rate

__all__ = [
    "ATTACKS",
    "CWL2",
    "DLR",
    "FGSM",
    "MIFGSM",
    "NFGSM",
    "APGDAttack",
    "APGDL1Attack",
    "APGDL2Attack",
    "APGDTargetedAttack",
    "APGDTargetedL1Attack",
    "APGDTargetedL2Attack",
    "ActiveSet",
    "AdvPatch",
    "ApplyPatch",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackL1",
    "AutoAttackL2",
    "Cascade",
    "CrossEntropy",
    "DeepFool",
    "EvadeDetector",
    "FABAttack",
    "FABL1Attack",
    "FABL2Attack",
    "FABTargetedAttack",
    "FABTargetedL1Attack",
    "FABTargetedL2Attack",
    "FewPixelDE",
    "Goal",
    "GuidedSparseRS",
    "HiddenViewPatch",
    "LaVAN",
    "Loss",
    "Margin",
    "MaskingAwarePatch",
    "MinimalNorm",
    "PGDAttack",
    "PGDL1Attack",
    "PGDL2Attack",
    "PatchAutoAttack",
    "PatchPGD",
    "PatchRS",
    "RandomNoise",
    "Restarts",
    "SigmaZero",
    "SparseAutoAttack",
    "SparsePGD",
    "SparseRS",
    "SquareAttack",
    "SquareL2Attack",
    "Targeted",
    "UniversalPatch",
    "Victim",
    "make_attack",
    "success_rate",
]
