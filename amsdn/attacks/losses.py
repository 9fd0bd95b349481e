"""Losses that an attack maximises: (logits [B,K], goal) -> one value per sample [B].

Each is a frozen dataclass, so that it can be part of an attack's configuration and hash.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.errors import InputError


@dataclass(frozen=True)
class Goal:
    """What the attacker wants of each sample: away from ``labels`` [B], or, if ``targeted``, exactly them."""

    labels: Tensor
    targeted: bool = False

    def reached(self, logits: Tensor) -> Tensor:
        """Whether the prediction is what the attacker wants, [B] bool."""
        return (logits.argmax(1) == self.labels) == self.targeted

    def select(self, rows: Tensor) -> "Goal":
        """The goal of the samples that the index or mask ``rows`` chooses."""
        return Goal(self.labels[rows], self.targeted)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of ``labels`` minus the best other logit, [B]: positive where the prediction is the label."""
    column = labels.unsqueeze(1)
    others = logits.scatter(1, column, -torch.inf)
    return logits.gather(1, column).squeeze(1) - others.amax(1)


@dataclass(frozen=True)
class Loss(ABC):
    """A per-sample loss; greater is nearer to the attacker's goal."""

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
    best other class, because that is when the target is predicted. Raises InputError below three (four) classes.
    """

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        needed = 4 if goal.targeted else 3
        if logits.shape[1] < needed:
            raise InputError(f"DLR: {needed} classes are needed, the classifier has {logits.shape[1]}; use the Margin loss")
        top = logits.topk(needed, dim=1).values
        scale = top[:, 0] - (top[:, 2:].mean(1) if goal.targeted else top[:, 2])
        return Margin()(logits, goal) / scale.clamp_min(1e-12)


CROSS_ENTROPY = CrossEntropy()  # defaults of the attacks
MARGIN = Margin()
