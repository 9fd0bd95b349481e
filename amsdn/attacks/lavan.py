"""LaVAN: unconstrained noise in one fixed place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require
from amsdn.attacks.losses import MARGIN, Goal, Loss
from amsdn.attacks.patch_attacks import Size, cut, inside, paste, patch_threat, sides
from amsdn.errors import InputError
from amsdn.threats import PatchRectangles, PatchRegion


@dataclass(frozen=True)
class LaVAN(Attack):
    """Localized and visible adversarial noise (Karmon, Zoran & Goldberg, ICML 2018), image domain.

    The noise lies in one place that never moves: ``corner`` (row, column) on every image, or a random one for each.
    Its content d climbs the difference of logits, not of probabilities, whose gradient vanishes for a sure model:
    d <- clip(d + alpha g / max|g|, 0, 1), with g the gradient within the patch of

        the target's logit - the best other logit      (the label's and the best other, negated, without a target).

    Deviations: the paper subtracts the *source* class's logit; ours, the strongest rival's, is the same until the source
    is overtaken and still aims at the target after that. The paper steps along the raw gradient, whose scale belongs to
    the model; ours is normalised by its largest entry, so ``alpha`` is the largest change of a value in one step.

    Per sample: ``num_steps`` forwards and backwards, and one more forward.
    """

    size: Size = 5  # side of the square or (height, width), pixels
    num_steps: int = 200
    alpha: float = 0.1
    corner: tuple[int, int] | None = None
    loss: Loss = MARGIN

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_steps >= 1, self, "num_steps must be at least 1", self.num_steps)
        require(self.alpha > 0, self, "alpha must be positive", self.alpha)

    @property
    def threat(self) -> PatchRegion | PatchRectangles:
        return patch_threat(self.size, 1)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        corner = self._place(x, generator)
        content = torch.rand(len(x), 3, *sides(self.size), generator=generator, device=x.device)
        x_adv = paste(x, content, corner)
        for _ in range(self.num_steps):
            gradient, loss, logits = active.gradient(x_adv, self.loss)
            stay = active.record(x_adv, loss, logits) if active.drop else None
            if stay is not None:
                if not len(active):
                    break
                gradient, content, corner = gradient[stay], content[stay], corner[stay]
            ascent = cut(gradient, corner, self.size)
            largest = ascent.abs().flatten(1).amax(1).clamp_min(torch.finfo(ascent.dtype).tiny).reshape(-1, 1, 1, 1)
            content = (content + self.alpha * ascent / largest).clamp(0, 1)
            x_adv = paste(active.x, content, corner)
        return active.conclude(x_adv, self.loss)

    def _place(self, x: Tensor, generator: torch.Generator) -> Tensor:
        drawn = PatchRectangles(*sides(self.size)).random_corners(x, generator).squeeze(1)  # checks that the patch fits
        if self.corner is None:
            return drawn
        given = torch.tensor(self.corner, device=x.device)
        if not torch.equal(inside(given, self.size, x), given):
            height, width = sides(self.size)
            raise InputError(f"LaVAN: a {height}x{width} patch at corner {self.corner} leaves images of {x.shape[2]}x{x.shape[3]}")
        return given.expand_as(drawn)
