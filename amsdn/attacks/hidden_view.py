"""Patch attack on prediction consistency: hide from the view that already errs, and win over all the others.

A defence that covers the image by large masks and alarms where a view gives the answer too little probability cannot be deceived in the
view that hides the patch: it says what it says of the clean image. So the attacker looks for a mask whose view of the clean image already
gives some wrong class much, puts the patch where that mask hides it, and makes all other views say that class. An attack that
follows the answer's gradient chooses its place by the answer and ends where a view stands against it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.attacks.base import ActiveSet, Attack, Victim, require, require_at_least_one
from amsdn.attacks.losses import CROSS_ENTROPY, MARGIN, Goal, Loss
from amsdn.attacks.patch_attacks import PatchPGD, Size, best_colour_gain, cut, paste, patch_threat, place_gain, sides
from amsdn.protocols import OccludedViews, occluded_views_of
from amsdn.threats import PatchRectangles, PatchRegion
from amsdn.utils.masking import covered_places


@dataclass(frozen=True)
class HiddenViewPatch(Attack):
    """Targets, for each image, the ``plans`` pairs of a mask and a wrong class to which that mask's view gives most (see the module).

    For each plan the patch goes to ``places`` places that the mask hides whole, drawn with odds by the first-order gain of the best
    content, the best first; from random content it climbs the log-probability of the class by signed gradient steps that shrink geometrically
    from ``alpha`` to ``last_alpha``. An image leaves as soon as the whole defence is fooled. Inside ``EvadeDetector`` "fooled" includes that no
    alarm is raised. A model without such views is attacked by ``PatchPGD.racing`` with as many steps.

    Per sample: a forward a mask; then ``num_steps`` backwards and forwards, and one more of each a plan.
    """

    size: Size = 5  # side of the square or (height, width), pixels
    num_steps: int = 120  # over all plans and places
    plans: int = 3
    places: int = 2
    alpha: float = 0.3
    last_alpha: float = 0.02
    loss: Loss = CROSS_ENTROPY

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "last_alpha"):
            require(getattr(self, name) > 0, self, f"{name} must be positive", getattr(self, name))
        require_at_least_one(self, "num_steps", "plans", "places")

    @property
    def threat(self) -> PatchRegion | PatchRectangles:
        return patch_threat(self.size, 1)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        views = occluded_views_of(victim.modules[0])
        if views is None:
            settings = {"eot_samples": self.eot_samples, "stop_when_fooled": self.stop_when_fooled}
            return PatchPGD.racing(self.size, self.num_steps, **settings).perturb(victim, x, goal, generator)
        masks = views.masks(x.shape[2], x.shape[3]).to(x.device)
        hidden = covered_places(masks, sides(self.size))  # [M,h,w]
        mask, wanted = self._plans(views, masks, victim, x, goal)  # [B,plans] each
        active, x_adv = self.active(victim, x, goal), x
        steps = max(self.num_steps // (mask.shape[1] * self.places), 1)
        for plan in range(mask.shape[1]):
            worth = self._worth(active, wanted[:, plan]).masked_fill(~hidden[mask[:, plan]], -torch.inf)  # [B,h,w]
            for place in range(self.places):
                corner = _drawn(worth, generator, best=place == 0)
                content = torch.rand(len(active), 3, *sides(self.size), generator=generator, device=x.device)
                x_adv = paste(active.x, content, corner)
                for step in range(steps):
                    gradient, stay = self._look(active, x_adv, wanted[:, plan])
                    if stay is not None:
                        if not len(active):
                            return active.result()
                        mask, wanted, worth = mask[stay], wanted[stay], worth[stay]
                        corner, content, gradient = corner[stay], content[stay], gradient[stay]
                    alpha = self.alpha * (self.last_alpha / self.alpha) ** (step / max(steps - 1, 1))
                    content = (content + alpha * cut(gradient, corner, self.size).sign()).clamp(0, 1)
                    x_adv = paste(active.x, content, corner)
        return active.conclude(x_adv, MARGIN)

    def _look(self, active: ActiveSet, x_adv: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient towards the wanted classes, and who stays, if some have left."""
        target = Goal(wanted, targeted=True)
        gradient, _, logits = active.victim.gradient(x_adv, lambda answer: self.loss(answer, target))
        return gradient, active.record(x_adv, MARGIN(logits, active.goal), logits) if active.drop else None

    def _plans(self, views: OccludedViews, masks: Tensor, victim: Victim, x: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        """The masks and wrong classes of greatest probability under that mask, best first, [B,plans] each."""
        with torch.no_grad():
            seen = torch.stack([views.classifier(torch.where(mask, views.fill, x)).float().log_softmax(1) for mask in masks], 1)
        victim.forwards.index_add_(0, victim.rows, torch.full_like(victim.rows, len(masks)))
        own = F.one_hot(goal.labels.clamp_min(0), seen.shape[2]).bool().unsqueeze(1)  # nothing is wanted of -1, and nothing reached
        flat = seen.masked_fill(~own if goal.targeted else own, -torch.inf).flatten(1)
        best = flat.topk(min(self.plans, flat.shape[1]), dim=1).indices
        return best // seen.shape[2], best % seen.shape[2]

    def _worth(self, active: ActiveSet, wanted: Tensor) -> Tensor:
        """What the best content at each place adds to the wanted class, to first order, [B,H-h+1,W-w+1]."""
        target = Goal(wanted, targeted=True)
        gradient, _, _ = active.victim.gradient(active.x, lambda answer: self.loss(answer, target))
        return place_gain(best_colour_gain(gradient, active.x), self.size)


def _drawn(worth: Tensor, generator: torch.Generator, *, best: bool) -> Tensor:
    """A place for each image as (row, column), [B,2]: the one of greatest worth [B,h,w], or one drawn in proportion to it."""
    flat = worth.flatten(1)
    if not best:
        uniform = torch.rand(flat.shape, generator=generator, device=flat.device).clamp_min(1e-12)
        flat = flat.clamp_min(1e-12).log().masked_fill(flat == -torch.inf, -torch.inf) - uniform.log().neg().log()  # Gumbel
    place = flat.argmax(1)
    return torch.stack([place // worth.shape[2], place % worth.shape[2]], 1)
