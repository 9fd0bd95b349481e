"""Standard cascades, one constructor each: the number that a defence should quote for a threat model.

Each part meets only the images that still stand, so the union over the parts, per image, costs little more than the
strongest part alone. White-box and black-box parts find different images, and a black-box part that finds many which the
white-box parts missed says that the gradients are masked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from amsdn.attacks.apgd import APGDAttack, APGDL1Attack, APGDL2Attack, APGDTargetedAttack, APGDTargetedL1Attack, APGDTargetedL2Attack
from amsdn.attacks.base import Attack, require, require_at_least_one
from amsdn.attacks.compose import Composite, Restarts
from amsdn.attacks.fab import FABTargetedAttack, FABTargetedL1Attack, FABTargetedL2Attack
from amsdn.attacks.guided_search import GuidedSparseRS
from amsdn.attacks.losses import CROSS_ENTROPY, DLR_OR_MARGIN, MARGIN
from amsdn.attacks.patch_attacks import PatchPGD, Size
from amsdn.attacks.patch_search import PatchRS
from amsdn.attacks.pixel_attacks import SparsePGD
from amsdn.attacks.search_attacks import SparseRS
from amsdn.attacks.square_attack import SquareAttack, SquareL2Attack

RAND_DRAWS = 20  # EOT draws per query of AutoAttack "rand"


@dataclass(frozen=True)
class _AutoAttack(Composite):
    """AutoAttack (Croce & Hein, ICML 2020); a subclass names the parts for its ball.

    ``standard``: APGD on cross-entropy, targeted APGD on the DLR loss, targeted FAB, Square; the targeted ones towards the
    ``n_targets`` best other classes. ``rand``, for defences that draw at random: APGD on cross-entropy and on DLR, with
    20 EOT draws a query. Step and query counts are the paper's. ``standard`` averages a random model over ``eot_samples``
    draws too, which the original does not do.
    """

    epsilon: float
    version: Literal["standard", "rand"] = "standard"
    num_steps: int = 100
    num_queries: int = 5000
    n_targets: int = 9

    apgd: ClassVar[Callable[..., Attack]]
    targeted: ClassVar[Sequence[Callable[..., Attack]]]
    search: ClassVar[Callable[..., Attack] | None]

    def __post_init__(self) -> None:
        require(self.version in ("standard", "rand"), self, "version must be standard or rand", self.version)
        require_at_least_one(self, "num_steps", "num_queries", "n_targets")
        super().__post_init__()

    @property
    def parts(self) -> Sequence[Attack]:
        return self._rand() if self.version == "rand" else self._standard()

    def _standard(self) -> Sequence[Attack]:
        cls, draws = type(self), self.eot_samples
        first = [cls.apgd(self.epsilon, self.num_steps, loss=CROSS_ENTROPY, eot_samples=draws)]
        each = [make(self.epsilon, self.num_steps, n_targets=self.n_targets, eot_samples=draws) for make in cls.targeted]
        last = [] if cls.search is None else [cls.search(self.epsilon, self.num_queries, eot_samples=draws)]
        return first + each + last

    def _rand(self) -> Sequence[Attack]:
        make = type(self).apgd
        return [make(self.epsilon, self.num_steps, loss=loss, eot_samples=RAND_DRAWS) for loss in (CROSS_ENTROPY, DLR_OR_MARGIN)]


@dataclass(frozen=True)
class AutoAttack(_AutoAttack):
    """AutoAttack in the Linf ball."""

    epsilon: float = 8 / 255  # in [0,1] pixel units; a tensor [B] gives one budget per image

    apgd = APGDAttack
    targeted = (APGDTargetedAttack, FABTargetedAttack)
    search = SquareAttack


@dataclass(frozen=True)
class AutoAttackL2(_AutoAttack):
    """AutoAttack in the L2 ball."""

    epsilon: float = 0.5  # Euclidean length over all pixels and channels; a tensor [B] gives one budget per image

    apgd = APGDL2Attack
    targeted = (APGDTargetedL2Attack, FABTargetedL2Attack)
    search = SquareL2Attack


@dataclass(frozen=True)
class AutoAttackL1(_AutoAttack):
    """AutoAttack in the L1 ball (Croce & Hein, "Mind the box", ICML 2021). The original ends with Square for L1, which is missing here."""

    epsilon: float = 12.0  # sum of absolute changes over all pixels and channels; a tensor [B] gives one budget per image
    n_targets: int = 5  # theirs, in this ball

    apgd = APGDL1Attack
    targeted = (APGDTargetedL1Attack, FABTargetedL1Attack)
    search = None


@dataclass(frozen=True)
class SparseAutoAttack(Composite):
    """Sparse AutoAttack (Zhong, Huang & Liu, ICML 2024), with our guided search in front.

    Theirs is sPGD unprojected, sPGD projected and Sparse-RS, 10,000 iterations each. ``GuidedSparseRS`` breaks more images at
    a fraction of that cost, so it goes first and leaves the long runs less to do. ``quick`` is sized for a CPU;
    docs/attacks/autoattack.md says how far the two differ.
    """

    k: int = 20  # pixels
    num_steps: int = 10_000  # of each sPGD
    num_queries: int = 10_000  # of Sparse-RS
    guided_queries: int = 10_000  # of each guided search
    guided_restarts: int = 1

    def __post_init__(self) -> None:
        require_at_least_one(self, "num_steps", "num_queries", "guided_queries", "guided_restarts")
        super().__post_init__()

    @classmethod
    def quick(cls, k: int = 20) -> Self:
        """The budget that fits a CPU."""
        return cls(k, num_steps=50, num_queries=300, guided_queries=1000, guided_restarts=3)

    @property
    def parts(self) -> Sequence[Attack]:
        draws = self.eot_samples
        return (
            Restarts(GuidedSparseRS(self.k, self.guided_queries, eot_samples=draws), self.guided_restarts, eot_samples=draws),
            SparsePGD(self.k, self.num_steps, eot_samples=draws),
            SparsePGD(self.k, self.num_steps, projected=True, eot_samples=draws),
            SparseRS(self.k, self.num_queries, eot_samples=draws),
        )


@dataclass(frozen=True)
class PatchAutoAttack(Composite):
    """The worst case over our patch attacks: racing PatchPGD on cross-entropy and on the margin, from fresh starts, then Patch-RS.

    ``quick`` is sized for a CPU; docs/attacks/autoattack.md says how far the two differ. A defence that votes over masked
    views deserves ``MaskingAwarePatch`` besides.
    """

    size: Size = 5  # side of the square or (height, width), pixels
    num_steps: int = 100  # of each run of PatchPGD
    num_queries: int = 10_000  # of Patch-RS
    restarts: int = 10  # runs on cross-entropy
    margin_restarts: int = 4  # runs on the margin

    def __post_init__(self) -> None:
        require_at_least_one(self, "num_steps", "num_queries", "restarts", "margin_restarts")
        super().__post_init__()

    @classmethod
    def quick(cls, size: Size = 5) -> Self:
        """The budget that fits a CPU."""
        return cls(size, num_queries=500, restarts=8, margin_restarts=3)

    @property
    def parts(self) -> Sequence[Attack]:
        draws = self.eot_samples
        climb, margin = (PatchPGD.racing(self.size, self.num_steps, loss=loss, eot_samples=draws) for loss in (CROSS_ENTROPY, MARGIN))
        return (
            Restarts(climb, self.restarts, eot_samples=draws),
            Restarts(margin, self.margin_restarts, eot_samples=draws),
            PatchRS(self.size, self.num_queries, eot_samples=draws),
        )
