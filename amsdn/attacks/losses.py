"""Losses that an attack maximises: (logits [B,K], goal) -> one value per sample [B].

Each is a frozen dataclass, so that it can be part of an attack's configuration and hash.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.errors import InputError


@dataclass(frozen=True)
class Goal:
    """What the attacker wants of each sample: away from ``labels`` [B], or, if ``targeted``, exactly them.

    A target of -1 stands for a sample of which nothing is wanted: it is never reached, and not attacked.
    """

    labels: Tensor
    targeted: bool = False

    @property
    def exists(self) -> Tensor:
        """Of which samples something is wanted, [B] bool."""
        return self.labels >= 0

    def reached(self, logits: Tensor) -> Tensor:
        """Whether the prediction is what the attacker wants, [B] bool. Logits with a NaN are no class: wrong, and no target."""
        answer = predicted(logits)
        return answer.eq(self.labels) & answer.ge(0) if self.targeted else answer.ne(self.labels)

    def select(self, rows: Tensor) -> "Goal":
        """The goal of the samples that the index or mask ``rows`` chooses."""
        return Goal(self.labels[rows], self.targeted)


def predicted(logits: Tensor) -> Tensor:
    """The class of the largest logit [B]; -1 where a logit is NaN, which is no answer."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of ``labels`` minus the best other logit, [B]: positive where the prediction is the label."""
    column = labels.unsqueeze(1)
    others = logits.scatter(1, column, -torch.inf)
    return logits.gather(1, column).squeeze(1) - others.amax(1)


@dataclass(frozen=True)
class Loss(ABC):
    """A per-sample loss; greater is nearer to the attacker's goal."""

    tells_classes: ClassVar[bool] = False  # whether it depends on which class a ``Towards`` goal tries

    @abstractmethod
    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        """logits [B,K] -> loss [B]."""


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross-entropy of the label; for a target, the log-probability of the target.

    Written as softplus(logsumexp of the other logits - the label's). The textbook form loses the label's part of the
    gradient once its probability rounds to 1 (a margin of 17 in float32), which makes a confident model look robust;
    this one keeps the direction exact up to a margin of about 85.
    """

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        column = goal.labels.unsqueeze(1)
        others = logits.scatter(1, column, -torch.inf).logsumexp(1)
        loss = F.softplus(others - logits.gather(1, column).squeeze(1))
        return -loss if goal.targeted else loss


@dataclass(frozen=True)
class Margin(Loss):
    """Best other logit minus the label's; for a target, the target's minus the best other. Positive means success."""

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        value = margin(logits, goal.labels)
        return value if goal.targeted else -value


@dataclass(frozen=True)
class DLR(Loss):
    """Difference of logits ratio (Croce & Hein, ICML 2020): the margin, free of the scale of the logits.

    Untargeted, eq. 6: divided by the first minus the third largest logit. Targeted, after eq. 7: divided by the first
    minus the mean of the third and fourth; where the paper sets the target against the label, we set it against the
    best other class, because that is when the target is predicted. Below three (four) classes there is nothing to
    divide by: ``fallback`` is used instead, and without one InputError is raised.
    """

    fallback: Loss | None = None

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        needed = 4 if goal.targeted else 3
        if logits.shape[1] < needed:
            if self.fallback is None:
                raise InputError(f"DLR: {needed} classes are needed, the classifier has {logits.shape[1]}; use the Margin loss")
            return self.fallback(logits, goal)
        top = logits.topk(needed, dim=1).values
        scale = top[:, 0] - (top[:, 2:].mean(1) if goal.targeted else top[:, 2])
        return Margin()(logits, goal) / scale.clamp_min(1e-12)


@dataclass(frozen=True)
class Towards(Goal):
    """An untargeted goal pursued towards one class after the other; what reaches it is for ``within`` to say, not the class.

    ``order`` [B,n] lists each sample's classes to try, ``rank`` says which of its columns is tried now.
    """

    within: Goal = field(kw_only=True)
    order: Tensor = field(kw_only=True)
    rank: int = 0

    @classmethod
    def likeliest(cls, goal: Goal, logits: Tensor, n: int) -> "Towards":
        """The goal towards the n classes (or all, if fewer) that the logits [B,K] put first after the label."""
        others = logits.scatter(1, goal.labels.unsqueeze(1), -torch.inf)
        return cls(goal.labels, within=goal, order=others.topk(min(n, logits.shape[1] - 1), dim=1).indices)

    @property
    def tried(self) -> Tensor:
        """The class tried now, [B]."""
        return self.order[:, self.rank]

    def reached(self, logits: Tensor) -> Tensor:
        return self.within.reached(logits)

    def select(self, rows: Tensor) -> "Towards":
        return replace(self, labels=self.labels[rows], within=self.within.select(rows), order=self.order[rows])


@dataclass(frozen=True)
class TargetedDLR(Loss):
    """The loss of targeted APGD (Croce & Hein, ICML 2020, eq. 7): (z_t - z_y) / (z_1st - (z_3rd + z_4th) / 2).

    The goal is a ``Towards``, whose class t is fixed while only misclassification counts. Below four classes the
    difference z_t - z_y itself is used. Any other goal gets the DLR loss (Margin where there are too few classes).
    """

    tells_classes: ClassVar[bool] = True

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        if not isinstance(goal, Towards):
            return DLR_OR_MARGIN(logits, goal)
        own, tried = (logits.gather(1, column.unsqueeze(1)).squeeze(1) for column in (goal.labels, goal.tried))
        if logits.shape[1] < 4:
            return tried - own
        top = logits.topk(4, dim=1).values
        return (tried - own) / (top[:, 0] - top[:, 2:].mean(1)).clamp_min(1e-12)


CROSS_ENTROPY = CrossEntropy()  # defaults of the attacks
MARGIN = Margin()
DLR_OR_MARGIN = DLR(fallback=MARGIN)
TARGETED_DLR = TargetedDLR()
