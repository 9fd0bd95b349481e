"""FAB, the fast adaptive boundary attack (Croce & Hein, ICML 2020), for Linf, L2 and L1.

The classifier's boundary is taken as a plane. Each step projects both the current and the clean image onto the plane
within the unit box, exactly, and goes to a point between the two projections, biased towards the clean image.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Victim, require, require_at_least_one
from amsdn.attacks.fab_norms import L1Norm, L2Norm, LinfNorm, PlaneNorm
from amsdn.attacks.losses import MARGIN, Goal
from amsdn.attacks.minimal_norm import SmallestSet, boundaries


@dataclass(frozen=True)
class _FAB(PlaneNorm):
    """The loop of one run (Algorithm 1), the random starts and the final search; subclasses say which runs, towards what.

    A run has a ``rank``: with a ranking [B,R] of each sample's rivals there are R, towards one column after the other.
    """

    epsilon: float
    num_steps: int = 100
    n_restarts: int = 1  # runs, the first from the clean image; for a targeted version, of each target
    alpha_max: float = 0.1  # the largest bias towards the clean image
    eta: float = 1.05  # steps are extrapolated beyond the plane by this factor
    beta: float = 0.9  # after an adversarial image the run goes on from this share of its change
    final_steps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "num_steps", "n_restarts")
        for name in ("alpha_max", "beta"):
            require(0 < getattr(self, name) <= 1, self, f"{name} must lie in (0, 1]", getattr(self, name))
        require(self.eta >= 1, self, "eta must be at least 1", self.eta)
        require(self.final_steps >= 0, self, "final_steps must not be negative", self.final_steps)

    @abstractmethod
    def _ranking(self, active: SmallestSet) -> Tensor | None:
        """Each sample's rivals [B,R] in the order of the runs; None for a single run that meets all boundaries at once."""

    @abstractmethod
    def _boundaries(self, logits: Tensor, goal: Goal, rivals: Tensor | None) -> Tensor:
        """logits [B,K] -> [M,B]: what becomes positive across each boundary that a run looks at."""

    @property
    def randomised(self) -> bool:
        return self.n_restarts > 1

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        ranking = self._ranking(active)
        for rank in range(1 if ranking is None else ranking.shape[1]):
            for restart in range(self.n_restarts):
                if len(active):
                    start = self._random_start(active, generator) if restart else active.x
                    ranking = self._walk(active, ranking, rank, start)
        if len(active) and self.final_steps:
            self._final_search(active)
        return active.result()

    def _walk(self, active: SmallestSet, ranking: Tensor | None, rank: int, x_adv: Tensor) -> Tensor | None:
        """The run of this rank from x_adv [B,3,H,W]; returns the ranking of the samples that are left."""
        for _ in range(self.num_steps):
            rivals = None if ranking is None else ranking[:, rank]
            normals, values, _ = active.victim.gradients(x_adv, lambda logits, r=rivals: self._boundaries(logits, active.goal, r))  # type: ignore[misc]
            x_adv = self._step(x_adv, active.x, normals, values)
            score, logits = active.query(x_adv, MARGIN)
            fooled = active.goal.reached(logits)
            stay = active.record(x_adv, score, logits)
            if stay is not None:
                ranking = None if ranking is None else ranking[stay]
                if not len(active):
                    break
                x_adv, fooled = x_adv[stay], fooled[stay]
            x_adv = torch.where(fooled.reshape(-1, 1, 1, 1), active.x + self.beta * (x_adv - active.x), x_adv)
        return ranking

    def _step(self, x_adv: Tensor, x: Tensor, normals: Tensor, values: Tensor) -> Tensor:
        """The biased step (eqs. 8 to 10) for x_adv, x [B,3,H,W], normals [M,B,3,H,W] and values [M,B] of the boundaries at x_adv."""
        here, clean, normals = x_adv.flatten(1), x.flatten(1), normals.flatten(2)
        scale = normals.abs().amax(2).clamp_min(torch.finfo(normals.dtype).tiny)  # squares of tiny gradients would vanish
        distance = values.abs() / scale / (self.dual(normals / scale.unsqueeze(2)) + 1e-12)
        nearest, column = distance.argmin(0), torch.arange(len(x), device=x.device)
        scale = scale[nearest, column]
        normal, gap = normals[nearest, column] / scale.unsqueeze(1), -values[nearest, column] / scale
        gap_clean = gap + (normal * (here - clean)).sum(1)  # of the same plane, from the clean image
        change = self.onto_plane(torch.cat((here, clean)), normal.repeat(2, 1), torch.cat((gap, gap_clean)))
        from_here, from_clean = change.chunk(2)
        length, length_clean = (self.length(c).clamp_min(1e-8) for c in (from_here, from_clean))
        alpha = (length / (length + length_clean)).clamp(max=self.alpha_max).unsqueeze(1)
        new = (1 - alpha) * (here + self.eta * from_here) + alpha * (clean + self.eta * from_clean)
        return new.clamp(0, 1).reshape(x.shape)

    def _random_start(self, active: SmallestSet, generator: torch.Generator) -> Tensor:
        """A point at half the distance of what was found, or of the budget if that is nearer, in a random direction."""
        x = active.x
        noise = torch.rand(x.shape, generator=generator, device=x.device).flatten(1) * 2 - 1
        radius = torch.minimum(active.distance, torch.as_tensor(active.threat.budget, device=x.device, dtype=x.dtype))
        radius = torch.where(radius.isfinite(), radius, self.start_radius) / 2
        return (x + (noise * (radius / self.length(noise)).unsqueeze(1)).reshape(x.shape)).clamp(0, 1)

    def _final_search(self, active: SmallestSet) -> None:
        """Look for a smaller image between the clean and the smallest adversarial one, by false position on the margin.

        Each guess is moved a hundredth towards the adversarial end: exactly on the boundary half of them would fail.
        """
        end = active.best
        low, high = torch.zeros(len(end), device=end.device), torch.ones(len(end), device=end.device)
        below, above = active.query(active.x, MARGIN)[0], active.query(end, MARGIN)[0]
        for _ in range(self.final_steps):
            share = (below / (below - above).clamp(max=-1e-12)).clamp(0, 1)
            at = low + (high - low) * (share + 0.01 * (1 - share))
            x_adv = active.x + at.reshape(-1, 1, 1, 1) * (end - active.x)
            score, logits = active.query(x_adv, MARGIN)
            fooled = active.goal.reached(logits)
            low, high = torch.where(fooled, low, at), torch.where(fooled, at, high)
            below, above = torch.where(fooled, below, score), torch.where(fooled, score, above)
            stay = active.record(x_adv, score, logits)
            if stay is not None:
                if not len(active):
                    break
                end, low, high, below, above = (t[stay] for t in (end, low, high, below, above))


@dataclass(frozen=True)
class _Nearest(_FAB):
    """FAB proper: each step goes to the nearest of the boundaries to the ``n_classes`` - 1 best rivals at the current image.

    The paper looks at all classes, which is the same up to ten classes. A step costs two forward passes and
    ``n_classes`` - 1 backward passes (targeted: one); the final search costs two forwards and one for each of its steps.
    """

    n_classes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_classes >= 2, self, "n_classes must be at least 2", self.n_classes)

    def _ranking(self, active: SmallestSet) -> None:
        return None

    def _boundaries(self, logits: Tensor, goal: Goal, rivals: Tensor | None) -> Tensor:
        return boundaries(logits, goal, self.n_classes - 1)


@dataclass(frozen=True)
class _Targeted(_FAB):
    """FAB-T: a run for each of the ``n_targets`` classes that are best at the clean image, each towards that class alone.

    Any misclassification counts. The classes are ranked once, for one forward; a step costs two forwards and one backward
    pass whatever the number of classes. For a targeted goal there is one run, to the boundary between the target and the
    best other class.
    """

    n_targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_targets >= 1, self, "n_targets must be at least 1", self.n_targets)

    def _ranking(self, active: SmallestSet) -> Tensor | None:
        if active.goal.targeted:
            return None
        others = active.victim.logits(active.x).scatter(1, active.goal.labels.unsqueeze(1), -torch.inf)
        return others.argsort(dim=1, descending=True, stable=True)[:, : min(self.n_targets, others.shape[1] - 1)]

    def _boundaries(self, logits: Tensor, goal: Goal, rivals: Tensor | None) -> Tensor:
        if rivals is None:
            return boundaries(logits, goal, 1)
        rival, label = (logits.gather(1, c.unsqueeze(1)) for c in (rivals, goal.labels))
        return (rival - label).T


@dataclass(frozen=True)
class FABAttack(LinfNorm, _Nearest):
    """FAB for Linf."""

    epsilon: float = 8 / 255  # what counts as success, math.inf for any size; a tensor [B] gives one budget per image


@dataclass(frozen=True)
class FABL2Attack(L2Norm, _Nearest):
    """FAB for L2."""

    epsilon: float = 0.5  # Euclidean length


@dataclass(frozen=True)
class FABL1Attack(L1Norm, _Nearest):
    """FAB for L1."""

    epsilon: float = 12.0  # sum of absolute changes


@dataclass(frozen=True)
class FABTargetedAttack(LinfNorm, _Targeted):
    """FAB-T for Linf, a part of AutoAttack."""

    epsilon: float = 8 / 255  # in [0,1] pixel units


@dataclass(frozen=True)
class FABTargetedL2Attack(L2Norm, _Targeted):
    """FAB-T for L2, a part of AutoAttack."""

    epsilon: float = 0.5  # Euclidean length


@dataclass(frozen=True)
class FABTargetedL1Attack(L1Norm, _Targeted):
    """FAB-T for L1."""

    epsilon: float = 12.0  # sum of absolute changes
