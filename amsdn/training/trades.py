"""What an attacked image costs in training: its own cross-entropy, or TRADES' pull towards the answer on the clean image."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from amsdn.attacks import Attack
from amsdn.attacks.losses import Goal, Loss
from amsdn.errors import InputError
from amsdn.training.attack_ranges import AttackRange, TrainingAttack
from amsdn.training.objectives import divergence
from amsdn.training.self_adaptive import Targets
from amsdn.training.views import answer


class Costs(NamedTuple):
    """What each attacked image costs: by its label [n], and for its answer having moved [n]."""

    label: Tensor
    moved: Tensor


@dataclass(frozen=True)
class AttackedLoss(ABC):
    """What attacked images cost, and what the attack on them climbs."""

    wants_twins: ClassVar[bool]  # whether the attacked images' clean versions are to be shown in the same pass

    @abstractmethod
    def __call__(self, attacked: Tensor, clean: Tensor | None, targets: Targets, first: int, label_smoothing: float) -> Costs:
        """Logits [n,K] on the attacked images, and on their clean twins if wanted; they are the images from ``first`` on in ``targets``."""

    def arm(self, attack: Attack, model: nn.Module, x: Tensor) -> Attack:
        """The attack as it is to climb this cost on the clean images x [n,3,H,W]."""
        return attack

    def check(self, entry: TrainingAttack) -> None:
        """Raise InputError for an attack that this cost cannot be trained with; all can, unless a subclass says otherwise."""
        return


@dataclass(frozen=True)
class LabelEntropy(AttackedLoss):
    """Cross-entropy of the attacked image, climbed by the attack's own loss (Madry et al., ICLR 2018, eq. 2.1)."""

    wants_twins: ClassVar[bool] = False

    def __call__(self, attacked: Tensor, clean: Tensor | None, targets: Targets, first: int, label_smoothing: float) -> Costs:
        cost = targets.cross_entropy(attacked, first, label_smoothing)
        return Costs(cost, torch.zeros_like(cost))


@dataclass(frozen=True)
class Trades(AttackedLoss):
    """CE(f(x), y) + beta KL(f(x) || f(x')), with x' climbing the same divergence (Zhang et al., ICML 2019, eq. 5).

    Gradients flow into both answers, as in the authors' code; the attack takes f(x) of the deployed model as fixed. With sPGD this
    is sTRADES, whose authors' code lets the attack climb cross-entropy instead: ``climb_divergence=False``. At the clean image
    itself the divergence has no gradient, so attacks must start from a random place; a first look at the clean image (PatchPGD with
    ``candidates`` > 1) finds nothing there.
    """

    beta: float = 6.0
    climb_divergence: bool = True

    wants_twins: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise InputError(f"objective: beta must be positive, got {self.beta}; 6 is the paper's for CIFAR-10")

    def __call__(self, attacked: Tensor, clean: Tensor | None, targets: Targets, first: int, label_smoothing: float) -> Costs:
        assert clean is not None
        return Costs(targets.cross_entropy(clean, first, label_smoothing), self.beta * divergence(clean, attacked))

    def arm(self, attack: Attack, model: nn.Module, x: Tensor) -> Attack:
        if not self.climb_divergence:
            return attack
        armed: dict[str, Any] = {"loss": Divergence(answer(model, x)), "stop_when_fooled": False}
        return replace(attack, **armed)

    def check(self, entry: TrainingAttack) -> None:
        if not self.climb_divergence:
            return
        for attack in entry.ends() if isinstance(entry, AttackRange) else (entry,):
            if not isinstance(getattr(attack, "loss", None), Loss) or not attack.randomised:
                raise InputError(
                    f"objective: TRADES cannot lend its divergence to {type(attack).__name__}, which has no loss to replace or starts "
                    "at the clean image, where it has no gradient; use an attack with a random start, or climb_divergence=False"
                )


@dataclass(frozen=True, eq=False)
class Divergence(Loss):
    """KL(reference || answer) of each sample, for an attack on a whole batch that drops none of it: ``reference`` [B,K] are logits."""

    reference: Tensor

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        assert logits.shape == self.reference.shape, f"{list(logits.shape)} answers for {list(self.reference.shape)} references"
        return divergence(self.reference, logits)
