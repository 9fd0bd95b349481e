"""Attacks that look for the smallest perturbation that reaches the goal, within a budget or without one.

With a finite budget and ``stop_when_fooled`` a sample leaves as soon as an adversarial image within the budget is
found. With ``stop_when_fooled=False``, or an infinite budget, the search goes on to its end and the smallest
adversarial image found is returned: ``AttackResult.spent`` is then the minimal norm, and one run gives robust
accuracy at every budget.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import ActiveSet, Attack, Victim
from amsdn.attacks.losses import Goal, Loss, margin
from amsdn.threats import TOLERANCE, ThreatModel


class SmallestSet(ActiveSet):
    """An active set that keeps the smallest adversarial image of each sample instead of the best-scored one.

    Recorded images must lie in the unit box, but may be farther from ``x`` than the budget. Until a sample has an
    adversarial image, the best-scored one is kept. ``settles``: a sample leaves with its first adversarial image of
    whatever size, for attacks that find nothing smaller later.
    """

    def __init__(self, victim: Victim, x: Tensor, goal: Goal, threat: ThreatModel, *, drop: bool = True, settles: bool = False) -> None:
        super().__init__(victim, x, goal, threat, drop=drop)
        self.distance = torch.full((len(x),), math.inf, device=x.device)  # of the smallest adversarial image, [B]; inf: none yet
        self._limit = torch.as_tensor(threat.budget, dtype=torch.float32, device=x.device).expand(len(x))
        self._settles, self._whole = settles, (x, threat)

    @property
    def best(self) -> Tensor:
        """For every active sample the smallest adversarial image, or the best-scored one where ``distance`` is inf, [B,3,H,W]."""
        return self._best

    def record(self, x_adv: Tensor, score: Tensor, logits: Tensor, finished: Tensor | None = None) -> Tensor | None:
        """Keep what is smaller, or better while nothing is adversarial; if samples left, the positions that stay, else None.

        x_adv [B,3,H,W] in the unit box, score [B], logits [B,K]. ``finished`` [B] bool: whose search is over whatever it found.
        """
        distance = self.threat.spent(x_adv, self.x)
        smaller = self._upheld(x_adv, self.goal.reached(logits) & (distance < self.distance) & ~self._done)
        better = (score > self._score) & self.distance.isinf()
        self._score = torch.where(better, score, self._score)
        self._best = torch.where((smaller | better).reshape(-1, 1, 1, 1), x_adv, self._best)
        self.distance = torch.where(smaller, distance, self.distance)
        if self.drop:
            if finished is not None:
                self._done = self._done | finished
            slack = 0.0 if self.threat.counts else TOLERANCE
            self._done = self._done | (smaller & (self._settles | (self._limit.isfinite() & (distance <= self._limit + slack))))
        self._tick += 1
        return self._shrink() if self.drop and self._tick % self.poll_every == 0 else None

    def conclude(self, x_adv: Tensor, loss: Loss) -> Tensor:
        """The result of an iteration that ended at ``x_adv``, which is scored first (one forward)."""
        if len(self):
            self.record(x_adv, *self.query(x_adv, loss))
        return self.result()

    def result(self) -> Tensor:
        """What was kept for every sample of the original batch, [B,3,H,W]; projected onto the threat where it is larger."""
        out, (x, threat) = super().result(), self._whole
        return torch.where(threat.contains(out, x).reshape(-1, 1, 1, 1), out, threat.project(out, x))

    def _shrink(self) -> Tensor | None:
        stay = super()._shrink()
        if stay is not None:
            self.distance, self._limit = self.distance[stay], self._limit[stay]
        return stay


def boundaries(logits: Tensor, goal: Goal, count: int) -> Tensor:
    """The ``count`` best rivals' logits minus the label's, [M,B], M = min(count, K - 1): one is positive once the goal is reached.

    For a targeted goal the one boundary that matters: the target's logit minus the best other, [1,B].
    """
    if goal.targeted:
        return margin(logits, goal.labels).unsqueeze(0)
    label = goal.labels.unsqueeze(1)
    rivals = logits.detach().scatter(1, label, -torch.inf).topk(min(count, logits.shape[1] - 1), dim=1).indices
    return (logits.gather(1, rivals) - logits.gather(1, label)).T


@dataclass(frozen=True)
class MinimalNorm(Attack):
    """An attack that looks for the smallest perturbation. Its budget is what counts as success and may be ``math.inf``.

    Where the smallest adversarial image found exceeds the budget, its projection onto the threat is returned, which
    the base class rescores like any other; where nothing adversarial was found, the projection of the best-scored image.
    """

    @property
    def randomised(self) -> bool:
        return False

    def active(self, victim: Victim, x: Tensor, goal: Goal) -> SmallestSet:
        """A fresh set of the given samples that keeps the smallest adversarial images."""
        return SmallestSet(victim, x, goal, self.threat_on(victim), drop=self.stop_when_fooled)
