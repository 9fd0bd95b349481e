"""Patch attack on defences by double masking (PatchCleanser, Xiang et al., USENIX Security 2022), by one who knows the masks.

What it exploits. P[i][j] is the class of the image under masks i and j; mask i *confirms* a class if P[i][j] is that class
for every j. Let C be the masks that hide a whole patch at some place.

- For i in C the patch is never seen: P[i][j] is the same with and without it, whatever its content. If such a mask confirms
  the true label y, the answer is y, because no mask k can then confirm another class (P[k][i] = P[i][k] = y) and i itself
  confirms y if the majority is wrong. If none does, nothing forces the answer. So the places that can work at all are known
  exactly from the clean image, and an image without any is out of reach of every attack.
- *Majority route*: at such a place, make a wrong class win the one-mask vote, and let no mask that still votes y confirm it.
- *Confirming route*: leave the majority at y, and make one wrong disagreer k confirm itself, P[k][j] = t for all j. For
  i in C, P[k][i] is fixed: it must be t on the clean image already.

Both come down to a set of views that should change class, on which the patch content climbs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.attacks.adaptive import frozen
from amsdn.attacks.base import Attack, Victim, require, require_at_least_one
from amsdn.attacks.losses import MARGIN, Goal
from amsdn.attacks.patch_attacks import PatchPGD, Size, best_colour_gain, cut, paste, patch_threat, place_gain, sides
from amsdn.protocols import MaskedVoting, masked_voting_of
from amsdn.threats import PatchRectangles, PatchRegion
from amsdn.utils.masking import covered_places, mask_pairs, masked_views, pair_table


@dataclass(frozen=True)
class MaskingAwarePatch(Attack):
    """Puts a patch where double masking cannot recover the truth, then forces a wrong answer (see the module's docstring).

    The idea is Xiang et al.'s necessary condition turned round; they publish no such attack, and this one is ours. Per image:

    1. The two-mask predictions of the clean image give the places that can work. An image without one is returned as it is.
    2. The ``majority_places`` best of them by the first-order gain of the best content, over all one-mask views, at least half
       a patch apart; then ``confirming_places`` pairs of a place and a mask k, by the number of P[k][j] that are wrong already.
       Where there are fewer, earlier ones come again with fresh content.
    3. At each in turn, from random content, ``num_steps`` signed gradient steps on the log-probability that a view is wrong
       (or the target), summed over ``views_per_step`` random views of those that must change. It is flat where a view is lost
       already, so that what still stands decides. Steps shrink geometrically from ``alpha`` to ``last_alpha``. Every
       ``check_every`` steps the real defence is asked, and only its answer counts.

    A defence that asks coarser masks first (``DoubleMasking.coarser``) fills the table itself; the steps then follow the views under
    its finest masks, and its answers decide. A defence declares its masks by ``protocols.MaskedVoting``; any other model is attacked by ``PatchPGD`` with as many steps in all.

    Counted are calls, of the classifier on one view or of the defence as a whole, which is M views or more. With M masks:
    M (M + 1) / 2 forwards for the table, M + ``confirming_places`` each way for the gains; then per place ``num_steps`` x
    ``views_per_step`` each way and ``num_steps`` / ``check_every`` forwards.
    ``views_per_pass`` bounds the memory; raise it on an accelerator.
    """

    size: Size = 5  # side of the square or (height, width), pixels
    num_steps: int = 40
    majority_places: int = 8
    confirming_places: int = 3
    views_per_step: int = 8
    check_every: int = 10
    alpha: float = 0.2
    last_alpha: float = 0.02
    views_per_pass: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "last_alpha"):
            require(getattr(self, name) > 0, self, f"{name} must be positive", getattr(self, name))
        require_at_least_one(self, "num_steps", "majority_places", "views_per_step", "check_every", "views_per_pass")
        require(self.confirming_places >= 0, self, "confirming_places must not be negative", self.confirming_places)

    @property
    def threat(self) -> PatchRegion | PatchRectangles:
        return patch_threat(self.size, 1)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        masking = masked_voting_of(victim.value)
        if masking is None:
            return self._plain().perturb(victim, x, goal, generator)
        views = _Views.of(masking, victim, x, self.views_per_pass)
        x_adv = x.clone()
        with frozen(*views.classifier.modules):
            clean = _CleanTable.of(views, victim, x, goal, self.size)
            worth = clean.viable.any(1) if self.stop_when_fooled else torch.ones_like(clean.viable[:, 0])
            rows = worth.nonzero().squeeze(1)
            if len(rows):
                victim, clean, x, goal = victim.select(rows), clean.select(rows), x[rows], goal.select(rows)
                plans = clean.majority_plans(views, victim, x, self)
                plans += clean.confirming_plans(views, victim, x, self, fallback=plans[0])
                x_adv[rows] = self._carry_out(plans, views, victim, x, goal, generator)
        return x_adv

    def _plain(self) -> PatchPGD:
        steps = self.num_steps * (self.majority_places + self.confirming_places)
        return PatchPGD(self.size, steps, eot_samples=self.eot_samples, stop_when_fooled=self.stop_when_fooled)

    def _carry_out(
        self, plans: list["_Plan"], views: "_Views", victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator
    ) -> Tensor:
        active = self.active(victim, x, goal)
        active.poll_every = 1  # a record comes after many steps: waiting for the device is nothing beside steps on fooled images
        x_adv = x
        for number in range(len(plans)):
            content = torch.rand(len(active), 3, *sides(self.size), generator=generator, device=x.device)
            x_adv = paste(active.x, content, plans[number].corner)
            for step in range(1, self.num_steps + 1):
                plan = plans[number]
                gradient = views.gradient(active.victim, x_adv, *plan.draw(self.views_per_step, generator), plan.wish)
                alpha = self.alpha * (self.last_alpha / self.alpha) ** (step / self.num_steps)
                content = (content + alpha * cut(gradient, plan.corner, self.size).sign()).clamp(0, 1)
                x_adv = paste(active.x, content, plan.corner)
                if not active.drop or (step % self.check_every and step < self.num_steps):
                    continue
                stay = active.record(x_adv, *active.query(x_adv, MARGIN))
                if stay is not None:
                    if not len(active):
                        return active.result()
                    content, x_adv, plans = content[stay], x_adv[stay], [p.select(stay) for p in plans]
        return active.result() if active.drop else x_adv


@dataclass(frozen=True)
class _Wish:
    """What the attacker wants a view to be called: ``label`` [B], or where ``anything_else`` [B] any class but that."""

    label: Tensor
    anything_else: Tensor

    def select(self, rows: Tensor) -> "_Wish":
        return _Wish(self.label[rows], self.anything_else[rows])

    def granted(self, classes: Tensor) -> Tensor:
        """Which of the predictions [B,...] are as wished, bool of the same shape."""
        shape = -1, *[1] * (classes.ndim - 1)
        return (classes == self.label.reshape(shape)) != self.anything_else.reshape(shape)

    def log_probability(self, logits: Tensor) -> Tensor:
        """logits [B,K] -> [B]: that the wish comes true."""
        column = self.label.unsqueeze(1)
        odds = logits.gather(1, column).squeeze(1) - logits.scatter(1, column, -torch.inf).logsumexp(1)
        return F.logsigmoid(torch.where(self.anything_else, -odds, odds))


@dataclass(frozen=True)
class _Views:
    """The classifier behind the masks, asked about images under pairs of masks [B,V]; every pass is counted for its image."""

    classifier: Victim
    masks: Tensor  # [M,1,H,W] bool
    fill: Tensor  # [1,3,1,1]
    per_pass: int
    declared_table: Callable[[Tensor], Tensor] | None = None  # of a defence whose table is not that of plain two-mask views

    @classmethod
    def of(cls, masking: MaskedVoting, victim: Victim, x: Tensor, per_pass: int) -> "_Views":
        classifier = Victim.of(masking.classifier, len(x), x.device, victim.eot_samples)
        counting = replace(classifier, forwards=victim.forwards, backwards=victim.backwards, rows=victim.rows)
        declared = masking.prediction_table if getattr(masking, "coarser", ()) else None  # type: ignore[attr-defined]
        return cls(counting, masking.masks(*x.shape[2:]), masking.fill, per_pass, declared)

    def table(self, victim: Victim, x: Tensor) -> Tensor:
        """P [B,M,M] of the images: what the defence says of every pair of masks. Counted is one pass a pair."""
        first, second = mask_pairs(len(self.masks), x.device)
        if self.declared_table is not None:
            victim.forwards.index_add_(0, victim.rows, torch.full_like(victim.rows, len(first)).to(victim.forwards))
            return self.declared_table(x)
        return pair_table(self.predictions(victim, x, first.expand(len(x), -1), second.expand(len(x), -1)), len(self.masks))

    def predictions(self, victim: Victim, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The classes of the views, [B,V] int64."""
        classes = [
            replace(self.classifier, rows=victim.rows[r]).logits(masked_views(x[r], self.masks, i, j, self.fill)).argmax(1)
            for r, i, j in self._passes(x, first, second)
        ]
        return torch.cat(classes).reshape(first.shape)

    def gradient(self, victim: Victim, x: Tensor, first: Tensor, second: Tensor, wish: _Wish) -> Tensor:
        """The gradient by x [B,3,H,W] of the log-probability of the wish, summed over the views."""
        total = torch.zeros_like(x)
        for r, i, j in self._passes(x, first, second):
            shown = masked_views(x[r], self.masks, i, j, self.fill)
            by_view, _, _ = replace(self.classifier, rows=victim.rows[r]).gradient(shown, wish.select(r).log_probability)
            total.index_add_(0, r, by_view.masked_fill(self.masks[i] | self.masks[j], 0.0))
        return total

    def gain(self, victim: Victim, x: Tensor, first: Tensor, second: Tensor, wish: _Wish, size: Size) -> Tensor:
        """What the best content at each place adds to the log-probability of the wish, to first order, [B,P]."""
        gain = best_colour_gain(self.gradient(victim, x, first, second, wish), x)
        return place_gain(gain, size).flatten(1)

    def _passes(self, x: Tensor, first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, ...]]:
        rows = torch.arange(len(x), device=x.device).repeat_interleave(first.shape[1])
        return zip(*(t.split(self.per_pass) for t in (rows, first.flatten(), second.flatten())), strict=True)


@dataclass(frozen=True)
class _Plan:
    """A place for each image, and the views that have to change there: mask j with ``partner[j]``, for each j that is not hidden."""

    corner: Tensor  # [B,2]
    partner: Tensor  # [B,M]: j itself (one-mask views), or the mask that is to confirm
    shows: Tensor  # [B,M] bool: the view exists and shows some of the patch's place
    wish: _Wish

    def select(self, rows: Tensor) -> "_Plan":
        return _Plan(self.corner[rows], self.partner[rows], self.shows[rows], self.wish.select(rows))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` random views of each image as pairs of masks, [B,count]; where fewer show the patch, they come again."""
        priority = torch.rand(self.shows.shape, generator=generator, device=self.shows.device).masked_fill(~self.shows, -1.0)
        order = priority.argsort(dim=1, descending=True)
        turn = torch.arange(count, device=order.device) % self.shows.sum(1, keepdim=True).clamp_min(1)
        second = order.gather(1, turn)
        return self.partner.gather(1, second), second

    def where(self, condition: Tensor, other: "_Plan") -> "_Plan":
        """This plan for the images of ``condition`` [B], else the other."""
        at = condition.unsqueeze(1)
        return _Plan(
            torch.where(at, self.corner, other.corner),
            torch.where(at, self.partner, other.partner),
            torch.where(at, self.shows, other.shows),
            _Wish(
                torch.where(condition, self.wish.label, other.wish.label),
                torch.where(condition, self.wish.anything_else, other.wish.anything_else),
            ),
        )


@dataclass(frozen=True)
class _CleanTable:
    """The two-mask predictions of the clean images, and what they say about each place (P places, row by row)."""

    table: Tensor  # [B,M,M]
    viable: Tensor  # [B,P] bool: no mask that hides a patch there confirms a class that the attacker does not want
    hidden: Tensor  # [M,P] bool: the mask hides a patch there
    wish: _Wish
    columns: int  # places in a row of the image

    def select(self, rows: Tensor) -> "_CleanTable":
        return replace(self, table=self.table[rows], viable=self.viable[rows], wish=self.wish.select(rows))

    @classmethod
    def of(cls, views: _Views, victim: Victim, x: Tensor, goal: Goal, size: Size) -> "_CleanTable":
        table = views.table(victim, x)
        wish = _Wish(goal.labels, torch.full_like(goal.labels, not goal.targeted, dtype=torch.bool))
        votes = table.diagonal(dim1=1, dim2=2)
        confirms_against = (table == votes.unsqueeze(2)).all(2) & ~wish.granted(votes)
        hidden = covered_places(views.masks, sides(size))
        viable = confirms_against.float() @ hidden.flatten(1).float() == 0
        return cls(table, viable, hidden.flatten(1), wish, hidden.shape[2])

    def majority_plans(self, views: _Views, victim: Victim, x: Tensor, attack: MaskingAwarePatch) -> list[_Plan]:
        """One-mask views, at the viable places of greatest gain; for an image without one (in training), at any places."""
        own = torch.arange(len(self.hidden), device=x.device).expand(len(x), -1)
        gain = views.gain(victim, x, own, own, self.wish, attack.size)
        allowed = self.viable | ~self.viable.any(1, keepdim=True)
        chosen = self._apart(gain.masked_fill(~allowed, -torch.inf), attack.majority_places, sides(attack.size))
        return [self._plan(place, own, self.wish) for place in chosen]

    def confirming_plans(self, views: _Views, victim: Victim, x: Tensor, attack: MaskingAwarePatch, fallback: _Plan) -> list[_Plan]:
        """Views under a mask k that should confirm a class t, for the k with the most P[k][j] = t; where there is none, ``fallback``."""
        wrong = self._wrong_answers()  # [B,M,K]
        most, label = wrong.max(2)
        plans = []
        for mask in most.argsort(dim=1, descending=True, stable=True)[:, : attack.confirming_places].T:
            wish = _Wish(label.gather(1, mask.unsqueeze(1)).squeeze(1), torch.zeros_like(self.wish.anything_else))
            row = self.table.gather(1, mask.reshape(-1, 1, 1).expand(-1, 1, len(self.hidden))).squeeze(1)  # P[k][.]
            lost = ~wish.granted(row)  # fixed against the attacker wherever that mask hides the patch
            possible = (lost.float() @ self.hidden.float() == 0) & ~self.hidden[mask]
            partner = mask.unsqueeze(1).expand(-1, len(self.hidden))
            gain = views.gain(victim, x, partner[:, :1], partner[:, :1], wish, attack.size)
            best, place = gain.masked_fill(~possible, -torch.inf).max(1)
            plans.append(self._plan(place, partner, wish).where(best > -torch.inf, fallback))
        return plans

    def _wrong_answers(self) -> Tensor:
        """How often mask k gives class t among the P[k][j], for the t that the attacker would take, [B,M,K]."""
        classes = int(torch.maximum(self.table.max(), self.wish.label.max())) + 1
        usable = self.table >= 0  # a view without a class counts for none
        counts = self.table.new_zeros(*self.table.shape[:2], classes).scatter_add_(2, self.table.clamp_min(0), usable.long())
        every = torch.arange(classes, device=counts.device).expand(len(counts), -1)
        return counts.masked_fill(~self.wish.granted(every).unsqueeze(1), -1)

    def _plan(self, place: Tensor, partner: Tensor, wish: _Wish) -> _Plan:
        corner = torch.stack([place // self.columns, place % self.columns], 1)
        return _Plan(corner, partner, ~self.hidden.T[place], wish)

    def _apart(self, score: Tensor, count: int, size: tuple[int, int]) -> Tensor:
        """The ``count`` best places by score [B,P], at least half a patch apart, [count,B]; if too few exist, they come again."""
        at = torch.arange(score.shape[1], device=score.device)
        rows, columns = at // self.columns, at % self.columns
        chosen, exists = [], []
        for _ in range(count):
            best, place = score.max(1)
            chosen.append(place)
            exists.append(best > -torch.inf)
            near = ((rows - rows[place].unsqueeze(1)).abs() * 2 < size[0]) & ((columns - columns[place].unsqueeze(1)).abs() * 2 < size[1])
            score = score.masked_fill(near, -torch.inf)
        turn = torch.arange(count, device=score.device).unsqueeze(1) % torch.stack(exists).sum(0).clamp_min(1)
        return torch.stack(chosen).gather(0, turn)
