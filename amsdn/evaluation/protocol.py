"""Fixed evaluations: the same attacks, budgets, images and seeds for every model, under a name and a version.

A number is comparable with another only if both come from the same protocol and version. Whatever changes what is measured (an attack, a step count, a
budget, how many images) raises ``VERSION``; what only makes it faster does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from amsdn.attacks import (
    APGDAttack,
    APGDL2Attack,
    APGDTargetedAttack,
    APGDTargetedL2Attack,
    Attack,
    AutoAttack,
    AutoAttackL2,
    Cascade,
    EvadeDetector,
    GuidedSparseRS,
    HiddenViewPatch,
    MaskingAwarePatch,
    PatchAutoAttack,
    PatchPGD,
    SparseAutoAttack,
    SparsePGD,
    SquareAttack,
    SquareL2Attack,
)
from amsdn.attacks.black_box import searches
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.reliability.diagnosis import Diagnosis, l2_diagnosis, linf_diagnosis, patch_diagnosis, sparse_diagnosis
from amsdn.protocols import detector_of, masked_voting_of, occluded_views_of

VERSION = 1
Name = Literal["quick", "standard", "full"]
QUERIES_ALONE = 4  # times as many as Square gets beside gradients
SMALL = 64  # pixels a side up to which an image has the budgets of CIFAR's


@dataclass(frozen=True)
class Budgets:
    """The attackers' budgets for images of one size: those of the curves, and of each family the one in the headline."""

    patch: Sequence[int]  # side of the square, pixels
    pixels: Sequence[int]
    linf: Sequence[float]  # in [0,1] pixel units
    l2: Sequence[float]  # Euclidean length over all pixels and channels
    headline: Mapping[str, float]


CIFAR = Budgets(
    patch=(2, 4, 5, 8),
    pixels=(1, 5, 10, 20),
    linf=(2 / 255, 4 / 255, 8 / 255),
    l2=(0.25, 0.5, 1.0),
    headline={"patch": 5, "sparse": 20, "linf": 8 / 255, "l2": 0.5},
)
IMAGENET = Budgets(
    patch=(16, 24, 32, 48),
    pixels=(50, 100, 250),
    linf=(1 / 255, 2 / 255, 4 / 255),
    l2=(0.5, 1.0, 2.0),
    headline={"patch": 32, "sparse": 250, "linf": 4 / 255, "l2": 1.0},
)


def budgets_for(side: int) -> Budgets:
    """The budgets for images of this many pixels a side."""
    return CIFAR if side <= SMALL else IMAGENET


@dataclass(frozen=True)
class Effort:
    """What the attacks of one protocol may spend on an image. At headline budgets by cascades, on the curves by single attacks."""

    samples: int  # the first so many test images in official order
    curve_steps: int  # of patch and sparse PGD
    ball_steps: int  # of APGD on the curves and in the cascade
    targets: int  # classes that targeted APGD goes for
    square_queries: int
    patch: Mapping[str, Any]  # fields of PatchAutoAttack
    sparse: Mapping[str, Any]  # fields of SparseAutoAttack
    evading_steps: int
    checked: int  # images of the reliability checks


EFFORTS: dict[Name, Effort] = {
    "quick": Effort(
        samples=100,
        curve_steps=40,
        ball_steps=10,
        targets=3,
        square_queries=100,
        patch={"num_steps": 60, "num_queries": 100, "restarts": 2, "margin_restarts": 1},
        sparse={"num_steps": 40, "num_queries": 100, "guided_queries": 300},
        evading_steps=60,
        checked=40,
    ),
    "standard": Effort(
        samples=1000,
        curve_steps=100,
        ball_steps=20,
        targets=9,
        square_queries=500,
        patch={"num_queries": 500, "restarts": 8, "margin_restarts": 3},
        sparse={"num_steps": 50, "num_queries": 300, "guided_queries": 1000, "guided_restarts": 3},
        evading_steps=100,
        checked=100,
    ),
    "full": Effort(
        samples=1000,
        curve_steps=100,
        ball_steps=100,
        targets=9,
        square_queries=5000,
        patch={},
        sparse={},
        evading_steps=400,
        checked=200,
    ),
}


@dataclass(frozen=True)
class Protocol:
    """One protocol for images of one size."""

    name: Name
    side: int  # of the images, pixels
    version: int = VERSION

    @classmethod
    def named(cls, name: str, side: int) -> "Protocol":
        """``quick``, ``standard`` or ``full``; raises InputError for anything else."""
        if name not in get_args(Name):
            raise InputError(f"--protocol {name}: no such protocol; choose one of {', '.join(get_args(Name))}")
        return cls(name, side)  # type: ignore[arg-type]

    @property
    def effort(self) -> Effort:
        return EFFORTS[self.name]

    @property
    def budgets(self) -> Budgets:
        return budgets_for(self.side)

    @property
    def config(self) -> EvaluateConfig:
        """Seed and chunks, which are part of what makes two runs the same."""
        return EvaluateConfig(seed=0, batch_size=50)

    @property
    def headline(self) -> Mapping[str, float]:
        """Family -> the budget that the headline table states."""
        return self.budgets.headline

    def diagnoses(self) -> dict[str, Diagnosis]:
        """By family, the attack whose reliability is checked, at the headline budget, and its companions."""
        side, count, epsilon, radius = self._headline()
        return {
            "patch": patch_diagnosis(side, self.side, PatchAutoAttack(side, **self.effort.patch)),
            "sparse": sparse_diagnosis(count, self.side, SparseAutoAttack(count, **self.effort.sparse)),
            "linf": linf_diagnosis(epsilon, self._linf()[f"autoattack-{_name(epsilon)}"]),
            "l2": l2_diagnosis(radius, self._l2()[f"autoattack-l2-{radius:g}"]),
        }

    def attacks(self, model: nn.Module) -> dict[str, Attack]:
        """Every attack by name; those on a detector, on masked voting and on occluded views where the model declares to have them."""
        return {**self._patches(model), **self._pixels(model), **self._linf(), **self._l2()}

    def black_box(self) -> dict[str, Attack]:
        """For a model whose gradients nobody can have: queries alone, at the same budgets. They say less, whatever they spend."""
        return searches((attack.threat for attack in self.attacks(nn.Identity()).values()), QUERIES_ALONE * self.effort.square_queries)

    def _headline(self) -> tuple[int, int, float, float]:
        found = self.budgets.headline
        return int(found["patch"]), int(found["sparse"]), found["linf"], found["l2"]

    def _patches(self, model: nn.Module) -> dict[str, Attack]:
        side, steps = self._headline()[0], self.effort.evading_steps
        found: dict[str, Attack] = {f"patch-pgd-{size}": PatchPGD.racing(size, self.effort.curve_steps) for size in self.budgets.patch}
        found[f"patch-autoattack-{side}"] = PatchAutoAttack(side, **self.effort.patch)
        if detector_of(model) is not None:
            found[f"patch-evading-{side}"] = EvadeDetector(PatchPGD.racing(side, steps))
        if occluded_views_of(model) is not None:
            hidden = HiddenViewPatch(side, steps)
            found[f"patch-hidden-view-{side}"] = EvadeDetector(hidden) if detector_of(model) is not None else hidden
        if masked_voting_of(model) is not None:
            found[f"patch-masking-aware-{side}"] = MaskingAwarePatch(side)
        return found

    def _pixels(self, model: nn.Module) -> dict[str, Attack]:
        count, steps = self._headline()[1], self.effort.evading_steps
        found: dict[str, Attack] = {f"sparse-pgd-{k}": SparsePGD(k, self.effort.curve_steps) for k in self.budgets.pixels}
        found[f"sparse-autoattack-{count}"] = SparseAutoAttack(count, **self.effort.sparse)
        if detector_of(model) is not None:
            both = Cascade((SparsePGD(count, steps), GuidedSparseRS(count, 3 * steps)))
            found[f"sparse-evading-{count}"] = EvadeDetector(both)
        return found

    def _linf(self) -> dict[str, Attack]:
        epsilon, effort = self._headline()[2], self.effort
        found: dict[str, Attack] = {f"apgd-{_name(e)}": APGDAttack(e, effort.ball_steps) for e in self.budgets.linf}
        parts = (
            APGDAttack(epsilon, effort.ball_steps),
            APGDTargetedAttack(epsilon, effort.ball_steps, n_targets=effort.targets),
            SquareAttack(epsilon, effort.square_queries),
        )
        found[f"autoattack-{_name(epsilon)}"] = AutoAttack(epsilon) if self.name == "full" else Cascade(parts)
        return found

    def _l2(self) -> dict[str, Attack]:
        radius, effort = self._headline()[3], self.effort
        found: dict[str, Attack] = {f"apgd-l2-{r:g}": APGDL2Attack(r, effort.ball_steps) for r in self.budgets.l2}
        parts = (
            APGDL2Attack(radius, effort.ball_steps),
            APGDTargetedL2Attack(radius, effort.ball_steps, n_targets=effort.targets),
            SquareL2Attack(radius, effort.square_queries),
        )
        found[f"autoattack-l2-{radius:g}"] = AutoAttackL2(radius) if self.name == "full" else Cascade(parts)
        return found


def _name(epsilon: float) -> str:
    return f"{round(255 * epsilon)}"
