"""DeepFool: walk to the nearest boundary of the linearised classifier (Moosavi-Dezfooli et al., CVPR 2016)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Victim, require
from amsdn.attacks.losses import MARGIN, Goal
from amsdn.attacks.minimal_norm import MinimalNorm, SmallestSet, boundaries
from amsdn.threats import L2Ball

ACROSS = 1e-4  # Euclidean length added to every step, as in the authors' code: the walk could end on the boundary itself


@dataclass(frozen=True)
class DeepFool(MinimalNorm):
    """The L2 DeepFool of Algorithm 2: at each step the shortest way to the nearest of the boundaries, taken as planes.

    It stops at the first adversarial image, which is small because every step is. As in the authors' code an image is
    queried ``overshoot`` beyond where the steps lead; unlike there it is then clipped into the unit box, and the walk
    goes on from the clipped image. ``n_classes``: how many classes, the label included, are looked at; the rivals are
    the best at the current image, where the authors fix the best at the clean one. Targeted: only the target's boundary.
    A step costs one forward and ``n_classes`` - 1 backward passes (targeted: one); one forward at the end.
    """

    epsilon: float = 0.5  # Euclidean length that counts as success, math.inf for any; a tensor [B] gives one per image
    num_steps: int = 50
    overshoot: float = 0.02
    n_classes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_steps >= 1, self, "num_steps must be at least 1", self.num_steps)
        require(self.overshoot >= 0, self, "overshoot must not be negative", self.overshoot)
        require(self.n_classes >= 2, self, "n_classes must be at least 2", self.n_classes)

    @property
    def threat(self) -> L2Ball:
        return L2Ball(self.epsilon)

    def active(self, victim: Victim, x: Tensor, goal: Goal) -> SmallestSet:
        return SmallestSet(victim, x, goal, self.threat_on(victim), drop=self.stop_when_fooled, settles=True)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        x_adv = x
        for _ in range(self.num_steps):
            normals, values, logits = active.victim.gradients(x_adv, lambda logits: boundaries(logits, active.goal, self.n_classes - 1))
            stay = active.record(x_adv, MARGIN(logits, active.goal), logits)
            if stay is not None:
                if not len(active):
                    break
                x_adv, normals, values = x_adv[stay], normals[:, stay], values[:, stay]
            walked = (x_adv - active.x) / (1 + self.overshoot) + shortest_step(normals, values)
            x_adv = (active.x + (1 + self.overshoot) * walked).clamp(0, 1)
        return active.conclude(x_adv, MARGIN)


def shortest_step(normals: Tensor, values: Tensor) -> Tensor:
    """Normals [M,B,3,H,W] and values [M,B] of M planes -> the step just across the nearest (eq. 9), [B,3,H,W]; zero without a gradient."""
    flat = normals.flatten(2)
    scale = flat.abs().amax(2).clamp_min(torch.finfo(flat.dtype).tiny)  # squares of tiny gradients would vanish
    flat = flat / scale.unsqueeze(2)
    length = flat.norm(dim=2)
    distance = torch.where(length > 0, values.abs() / scale / length.clamp_min(1e-12), torch.inf)
    nearest, column = distance.argmin(0), torch.arange(normals.shape[1], device=normals.device)
    far = (distance[nearest, column] + ACROSS).nan_to_num(posinf=0.0)
    return (far / length[nearest, column].clamp_min(1e-12)).reshape(-1, 1, 1, 1) * flat[nearest, column].reshape(normals.shape[1:])
