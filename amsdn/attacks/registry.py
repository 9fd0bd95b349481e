"""Every attack by its name. A test suite runs over all of them, so a new entry is tested unasked."""

from collections.abc import Callable
from functools import partial
from typing import Any

from amsdn.attacks.apgd import (
    APGDAttack,
    APGDL1Attack,
    APGDL2Attack,
    APGDTargetedAttack,
    APGDTargetedL1Attack,
    APGDTargetedL2Attack,
)
from amsdn.attacks.base import Attack
from amsdn.attacks.carlini_wagner import CWL2
from amsdn.attacks.deepfool import DeepFool
from amsdn.attacks.fab import FABAttack, FABL1Attack, FABL2Attack, FABTargetedAttack, FABTargetedL1Attack, FABTargetedL2Attack
from amsdn.attacks.few_pixel import FewPixelDE
from amsdn.attacks.gradient_attacks import FGSM, MIFGSM, NFGSM, PGDAttack, PGDL1Attack, PGDL2Attack
from amsdn.attacks.guided_search import GuidedSparseRS
from amsdn.attacks.hidden_view import HiddenViewPatch
from amsdn.attacks.lavan import LaVAN
from amsdn.attacks.losses import DLR_OR_MARGIN
from amsdn.attacks.masking_aware import MaskingAwarePatch
from amsdn.attacks.noise import RandomNoise
from amsdn.attacks.patch_attacks import PatchPGD
from amsdn.attacks.patch_search import PatchRS
from amsdn.attacks.pixel_attacks import SparsePGD
from amsdn.attacks.search_attacks import SparseRS
from amsdn.attacks.sigma_zero import SigmaZero
from amsdn.attacks.square_attack import SquareAttack, SquareL2Attack
from amsdn.attacks.suites import AutoAttack, AutoAttackL1, AutoAttackL2, PatchAutoAttack, SparseAutoAttack
from amsdn.attacks.universal_patch import AdvPatch
from amsdn.errors import InputError

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "n-fgsm": NFGSM,
    "mi-fgsm": MIFGSM,
    "pgd": PGDAttack,
    "pgd-l2": PGDL2Attack,
    "pgd-l1": PGDL1Attack,
    "apgd-ce": APGDAttack,
    "apgd-dlr": partial(APGDAttack, loss=DLR_OR_MARGIN),
    "apgd-t": APGDTargetedAttack,
    "apgd-l2-ce": APGDL2Attack,
    "apgd-l2-dlr": partial(APGDL2Attack, loss=DLR_OR_MARGIN),
    "apgd-l2-t": APGDTargetedL2Attack,
    "apgd-l1-ce": APGDL1Attack,
    "apgd-l1-dlr": partial(APGDL1Attack, loss=DLR_OR_MARGIN),
    "apgd-l1-t": APGDTargetedL1Attack,
    "cw-l2": CWL2,
    "deepfool": DeepFool,
    "fab": FABAttack,
    "fab-t": FABTargetedAttack,
    "fab-l2": FABL2Attack,
    "fab-l2-t": FABTargetedL2Attack,
    "fab-l1": FABL1Attack,
    "fab-l1-t": FABTargetedL1Attack,
    "square": SquareAttack,
    "square-l2": SquareL2Attack,
    "patch-pgd": PatchPGD.racing,
    "patch-pgd-plain": PatchPGD,
    "adv-patch": AdvPatch,
    "patch-pgd-full": partial(PatchPGD, move="full"),
    "patch-rs": PatchRS,
    "patch-masking-aware": MaskingAwarePatch,
    "patch-hidden-view": HiddenViewPatch,
    "lavan": LaVAN,
    "sparse-pgd": SparsePGD,
    "sparse-pgd-projected": partial(SparsePGD, projected=True),
    "sparse-rs": SparseRS,
    "sparse-rs-guided": GuidedSparseRS,
    "sigma-zero": SigmaZero,
    "one-pixel": FewPixelDE,
    "few-pixel": partial(FewPixelDE, k=5),
    "noise": RandomNoise,
    "autoattack": AutoAttack,
    "autoattack-rand": partial(AutoAttack, version="rand"),
    "autoattack-l2": AutoAttackL2,
    "autoattack-l1": AutoAttackL1,
    "patch-autoattack": PatchAutoAttack,
    "patch-autoattack-quick": PatchAutoAttack.quick,
    "sparse-autoattack": SparseAutoAttack,
    "sparse-autoattack-quick": SparseAutoAttack.quick,
}


def make_attack(name: str, **settings: Any) -> Attack:
    """The named attack with the given settings over its defaults. Raises InputError for an unknown name or setting."""
    if name not in ATTACKS:
        raise InputError(f"unknown attack {name!r}; known: {', '.join(ATTACKS)}")
    try:
        return ATTACKS[name](**settings)
    except TypeError as e:
        raise InputError(f"attack {name}: {e}; see the fields of the attack's class") from e
