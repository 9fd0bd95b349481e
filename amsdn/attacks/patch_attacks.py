"""White-box patch attack that searches content and place together, and the patch geometry that all patch attacks share."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.attacks.base import ActiveSet, Attack, Victim, require, require_at_least_one
from amsdn.attacks.losses import CROSS_ENTROPY, Goal, Loss
from amsdn.errors import InputError
from amsdn.threats import PatchRectangles, PatchRegion, rectangle_mask

Size = int | tuple[int, int]  # the side of a square, or (height, width); pixels


@dataclass(frozen=True)
class PatchPGD(Attack):
    """Location-optimised patch PGD (Rao, Stutz & Schiele, ECCV Workshops 2020).

    The content climbs by signed gradient steps; every ``move_every`` steps a patch tries to move by ``stride``
    pixels with its content: ``full`` tries all four directions and keeps the best place, ``random`` tries one.
    A move is judged with the content whose loss the gradient pass has just given, so it costs one forward a
    direction and no more. ``size`` is the side of a square or (height, width). With ``count`` > 1 patches all contents
    climb together and the patches take turns to move, so a step costs the same.

    Ours are the two settings that find good places:

    - ``starts`` > 1: that many random starts race by successive halving. In each of log2(starts) + 1 rounds an equal
      share of ``num_steps`` is dealt evenly to the starts that are left, then the better half (by loss, per image) goes
      on. ``num_steps`` stays the gradient passes of the whole race.
    - ``candidates`` > 1: each patch of each start is first put at the best of that many random places by the
      first-order gain of the best possible content, which costs one gradient pass.

    The steps shrink geometrically from ``alpha`` to ``last_alpha`` if that is given.
    Per sample: ``num_steps`` backwards and (1 + 1/move_every or 4/move_every) x ``num_steps`` forwards, and one more forward.
    """

    size: Size = 5  # side of the square or (height, width), pixels
    num_steps: int = 100
    alpha: float = 0.05
    move: Literal["random", "full", "never"] = "random"
    move_every: int = 1
    stride: int = 2
    candidates: int = 1
    loss: Loss = CROSS_ENTROPY
    count: int = 1  # patches on every image
    starts: int | None = 1  # None: a sixth of num_steps, at most 16
    central_start: bool = False  # the first start's first patch begins in the middle of the image, where objects tend to be
    last_alpha: float | None = None  # None: alpha throughout

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, self, "alpha must be positive", self.alpha)
        require(self.last_alpha is None or self.last_alpha > 0, self, "last_alpha must be positive", self.last_alpha)
        require_at_least_one(self, "num_steps", "move_every", "stride", "candidates", "count")
        require(self.starts is None or self.starts >= 1, self, "starts must be at least 1", self.starts)
        require(self.move in ("random", "full", "never"), self, "move must be random, full or never", self.move)

    @classmethod
    def racing(cls, size: Size = 5, num_steps: int = 100, **settings: Any) -> Self:
        """The settings that broke most for their cost in our measurements (docs/attacks/patch.md); the plain ones are the paper's.

        A start needs a few steps to show its worth, so a short run has fewer of them than the 16 of 100 steps.
        """
        return cls(
            size, num_steps, **{"alpha": 0.2, "last_alpha": 0.05, "starts": None, "candidates": 4, "central_start": True, **settings}
        )

    @property
    def threat(self) -> PatchRegion | PatchRectangles:
        return patch_threat(self.size, self.count)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        corner = self._first_corners(active, generator)  # [S,B,n,2]
        content = torch.rand(*corner.shape[:3], 3, *sides(self.size), generator=generator, device=x.device)  # [S,B,n,3,h,w]
        score = corner.new_zeros(corner.shape[:2], dtype=torch.float32)  # [S,B]
        step = done = 0
        for racers, turns in self._rounds():
            if racers < len(score):
                best = score.topk(racers, dim=0).indices  # [R,B]
                rows = torch.arange(len(active), device=x.device)
                corner, content, score = corner[best, rows], content[best, rows], score[best, rows]
            for turn, racer in itertools.product(range(done + 1, done + turns + 1), range(racers)):
                x_adv = paste(active.x, content[racer], corner[racer])
                gradient, loss, logits = active.gradient(x_adv, self.loss)
                stay = active.record(x_adv, loss, logits) if active.drop else None
                if stay is not None:
                    if not len(active):
                        return active.result()
                    gradient, loss = gradient[stay], loss[stay]
                    corner, content, score = corner[:, stay], content[:, stay], score[:, stay]
                score[racer] = loss
                climbed = content[racer] + self._alpha_at(step) * cut(gradient, corner[racer], self.size).sign()
                if self.move != "never" and turn % self.move_every == 0:
                    who = turn // self.move_every % self.count
                    corner[racer] = self._move(active, content[racer], corner[racer], who, loss, generator)
                content[racer] = climbed.clamp(0, 1)
                step += 1
            done += turns
        return active.conclude(paste(active.x, content[0], corner[0]), self.loss)

    def _first_starts(self) -> int:
        return min(max(self.num_steps // 6, 1), 16) if self.starts is None else min(self.starts, self.num_steps)

    def _rounds(self) -> list[tuple[int, int]]:
        """The race: (starts still in it, gradient steps of each), which use ``num_steps`` steps in all."""
        racers, left, plan = self._first_starts(), self.num_steps, []
        halvings = racers.bit_length()  # rounds, the last with one start
        share = self.num_steps // halvings
        while racers > 1:
            plan.append((racers, max(share // racers, 1)))
            left -= racers * plan[-1][1]
            racers = min(racers // 2, max(left, 1))
        return [*plan, (1, left)]

    def _alpha_at(self, step: int) -> float:
        if self.last_alpha is None or self.num_steps == 1:
            return self.alpha
        return self.alpha * (self.last_alpha / self.alpha) ** (step / (self.num_steps - 1))

    def _first_corners(self, active: ActiveSet, generator: torch.Generator) -> Tensor:
        """Where each start's patches begin, [S,B,n,2] as row and column. Override it to choose other places."""
        corners = self._drawn_corners(active, generator)
        if self.central_start:
            for axis, side in enumerate(sides(self.size)):
                corners[0, :, 0, axis] = (active.x.shape[2 + axis] - side) // 2
        return corners

    def _drawn_corners(self, active: ActiveSet, generator: torch.Generator) -> Tensor:
        threat = PatchRectangles(*sides(self.size))
        starts = self._first_starts()
        if self.candidates == 1:
            several = PatchRectangles(*sides(self.size), count=self.count)
            return torch.stack([several.random_corners(active.x, generator) for _ in range(starts)])
        gradient, _, _ = active.gradient(active.x, self.loss)
        gain = best_colour_gain(gradient, active.x)
        corners = []
        for _ in range(starts):
            left = gain
            for _ in range(self.count):
                drawn = torch.stack([threat.random_corners(active.x, generator).squeeze(1) for _ in range(self.candidates)])  # [C,B,2]
                worth = place_gain(left, self.size)
                rows = torch.arange(len(left), device=left.device)
                corners.append(drawn[worth[rows, drawn[..., 0], drawn[..., 1]].argmax(0), rows])
                left = left.masked_fill(rectangle_mask(corners[-1].unsqueeze(1), *sides(self.size), left), 0)
        return torch.stack(corners).unflatten(0, (starts, self.count)).transpose(1, 2).contiguous()

    def _move(self, active: ActiveSet, content: Tensor, corner: Tensor, who: int, loss: Tensor, generator: torch.Generator) -> Tensor:
        """The best of staying (worth ``loss`` [B]) and of the tried moves of patch number ``who``, [B,n,2]."""
        if self.move == "random":
            picks = [torch.randint(4, (len(corner),), generator=generator, device=corner.device)]
        else:
            picks = [torch.full((len(corner),), pick, device=corner.device) for pick in range(4)]
        best = corner
        for pick in picks:
            there = corner.clone()
            there[:, who] = inside(corner[:, who] + self.stride * direction(pick), self.size, active.x)
            value, _ = active.query(paste(active.x, content, there), self.loss)
            better = value > loss
            best, loss = torch.where(better.reshape(-1, 1, 1), there, best), torch.where(better, value, loss)
        return best


def sides(size: Size) -> tuple[int, int]:
    """Height and width, in pixels."""
    return (size, size) if isinstance(size, int) else size


def patch_threat(size: Size, count: int) -> PatchRegion | PatchRectangles:
    """The threat model of ``count`` patches: one square has its own, in which the budget is the side."""
    if not isinstance(size, int) and not (isinstance(size, tuple) and len(size) == 2):
        raise InputError(f"a patch's size must be one whole number or (height, width), got {size!r}")
    height, width = sides(size)
    return PatchRegion(height) if height == width and count == 1 else PatchRectangles(height, width, count)


def direction(pick: Tensor) -> Tensor:
    """pick [B] in 0..3 -> one step up, down, left or right, [B,2] as row and column; made on the device, without a wait."""
    sign, vertical = 2 * (pick % 2) - 1, pick < 2
    return torch.stack([sign * vertical, sign * ~vertical], 1)


def inside(corner: Tensor, size: Size, x: Tensor) -> Tensor:
    """The nearest corners [...,2] (row, column) at which a patch lies within the images x [B,3,H,W]."""
    height, width = sides(size)
    return torch.stack([corner[..., 0].clamp(0, x.shape[2] - height), corner[..., 1].clamp(0, x.shape[3] - width)], -1)


def corner_grid(corner: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of the patch at each corner [B,2] (or [B,n,2]) into [B,3,H,W], broadcasting to [B,3,h,w] (or [B,n,3,h,w])."""
    height, width = sides(size)
    ahead = [1] * (corner.ndim - 2)
    b = torch.arange(len(corner), device=corner.device).reshape(-1, *ahead, 1, 1, 1)
    c = torch.arange(3, device=corner.device).reshape(-1, 1, 1)
    rows = corner[..., 0, None, None, None] + torch.arange(height, device=corner.device).reshape(-1, 1)
    columns = corner[..., 1, None, None, None] + torch.arange(width, device=corner.device)
    return b, c, rows, columns


def cut(images: Tensor, corner: Tensor, size: Size) -> Tensor:
    """The patch at each corner [B,2] (row, column) of images [B,3,H,W] -> [B,3,h,w]; corners [B,n,2] -> [B,n,3,h,w]."""
    return images[corner_grid(corner, size)]


def paste(x: Tensor, content: Tensor, corner: Tensor) -> Tensor:
    """A copy of x [B,3,H,W] that shows content [B,3,h,w] at each corner [B,2] (row, column).

    Several patches an image, content [B,n,3,h,w] at corners [B,n,2], are pasted in order: the last is on top.
    """
    if corner.ndim == 2:
        content, corner = content.unsqueeze(1), corner.unsqueeze(1)
    out = x.clone()
    for k in range(corner.shape[1]):
        out[corner_grid(corner[:, k], (content.shape[-2], content.shape[-1]))] = content[:, k]
    return out


def best_colour_gain(gradient: Tensor, x: Tensor) -> Tensor:
    """First-order rise of the loss if a pixel takes its best colour, [B,1,H,W]; exact for a linear model."""
    return torch.maximum(gradient * (1 - x), -gradient * x).sum(1, keepdim=True)


def place_gain(gain: Tensor, size: Size) -> Tensor:
    """What a patch of ``size`` gains at each place, the mean of the pixels' gains [B,1,H,W] under it, [B,H-h+1,W-w+1]."""
    return F.avg_pool2d(gain, sides(size), stride=1).squeeze(1)
