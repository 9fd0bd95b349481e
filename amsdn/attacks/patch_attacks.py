"""White-box patch attack that searches content and place together."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.attacks.base import ActiveSet, Attack, Victim, require
from amsdn.attacks.losses import CROSS_ENTROPY, Goal, Loss
from amsdn.threats import PatchRegion

DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))


@dataclass(frozen=True)
class PatchPGD(Attack):
    """Location-optimised patch PGD (Rao, Stutz & Schiele, ECCV-W 2020).

    The content climbs by signed gradient steps; every ``move_every`` steps the patch tries to move by ``stride``
    pixels with its content: ``full`` tries all four directions and keeps the best place, ``random`` tries one.
    A move is judged with the content whose loss the gradient pass has just given, so it costs one forward a
    direction and no more. Our addition: with ``candidates > 1`` the first place is the best of that many random
    ones by the first-order gain of the best possible content, which costs one gradient pass.

    Per sample: ``num_steps`` backwards and (1 + 1/move_every or 4/move_every) x ``num_steps`` forwards.
    """

    size: int = 5  # side of the square, pixels
    num_steps: int = 100
    alpha: float = 0.05
    move: Literal["random", "full", "never"] = "random"
    move_every: int = 1
    stride: int = 2
    candidates: int = 1
    loss: Loss = CROSS_ENTROPY

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, self, "alpha must be positive", self.alpha)
        for name in ("num_steps", "move_every", "stride", "candidates"):
            require(getattr(self, name) >= 1, self, f"{name} must be at least 1", getattr(self, name))
        require(self.move in ("random", "full", "never"), self, "move must be random, full or never", self.move)

    @property
    def threat(self) -> PatchRegion:
        return PatchRegion(self.size)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        corner = self._first_corners(active, generator)
        content = torch.rand(len(x), 3, self.size, self.size, generator=generator, device=x.device)
        x_adv = paste(x, content, corner)
        for step in range(self.num_steps):
            gradient, loss, logits = active.gradient(x_adv, self.loss)
            stay = active.record(x_adv, loss, logits) if active.drop else None
            if stay is not None:
                if not len(active):
                    break
                gradient, loss, content, corner = gradient[stay], loss[stay], content[stay], corner[stay]
            ascent = cut(gradient, corner, self.size).sign()
            if self.move != "never" and (step + 1) % self.move_every == 0:
                corner = self._move(active, content, corner, loss, generator)
            content = (content + self.alpha * ascent).clamp(0, 1)
            x_adv = paste(active.x, content, corner)
        return active.conclude(x_adv, self.loss)

    def _first_corners(self, active: ActiveSet, generator: torch.Generator) -> Tensor:
        drawn = torch.stack([torch.stack(self.threat.random_corners(active.x, generator), 1) for _ in range(self.candidates)])
        if self.candidates == 1:
            return drawn[0]
        gradient, _, _ = active.gradient(active.x, self.loss)
        gain = F.avg_pool2d(best_colour_gain(gradient, active.x), self.size, stride=1).squeeze(1)  # [B,H-s+1,W-s+1]
        rows = torch.arange(len(gain), device=gain.device)
        best = torch.stack([gain[rows, c[:, 0], c[:, 1]] for c in drawn]).argmax(0)
        return drawn[best, rows]

    def _move(self, active: ActiveSet, content: Tensor, corner: Tensor, loss: Tensor, generator: torch.Generator) -> Tensor:
        """The best of staying (worth ``loss`` [B]) and of the tried moves, [B,2]."""
        directions = self.stride * torch.tensor(DIRECTIONS, device=corner.device)
        if self.move == "random":
            pick = torch.randint(4, (len(corner),), generator=generator, device=corner.device)
            shifts = directions[pick].unsqueeze(0)  # [1,B,2]
        else:
            shifts = directions.unsqueeze(1)  # [4,1,2]
        limit = torch.tensor(active.x.shape[2:], device=corner.device) - self.size
        best = corner
        for shift in shifts:
            there = torch.minimum((corner + shift).clamp(min=0), limit)
            value, _ = active.query(paste(active.x, content, there), self.loss)
            better = value > loss
            best, loss = torch.where(better.unsqueeze(1), there, best), torch.where(better, value, loss)
        return best


def corner_grid(corner: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of a size x size square at each corner [B,2] into [B,3,H,W], broadcasting to [B,3,size,size]."""
    b = torch.arange(len(corner), device=corner.device).reshape(-1, 1, 1, 1)
    c = torch.arange(3, device=corner.device).reshape(1, -1, 1, 1)
    i = torch.arange(size, device=corner.device)
    rows = corner[:, 0].reshape(-1, 1, 1, 1) + i.reshape(1, 1, -1, 1)
    columns = corner[:, 1].reshape(-1, 1, 1, 1) + i.reshape(1, 1, 1, -1)
    return b, c, rows, columns


def cut(images: Tensor, corner: Tensor, size: int) -> Tensor:
    """The square at each corner [B,2] (row, column) of images [B,3,H,W] -> [B,3,size,size]."""
    return images[corner_grid(corner, size)]


def paste(x: Tensor, content: Tensor, corner: Tensor) -> Tensor:
    """A copy of x [B,3,H,W] that shows content [B,3,s,s] at each corner [B,2] (row, column)."""
    out = x.clone()
    out[corner_grid(corner, content.shape[-1])] = content
    return out


def best_colour_gain(gradient: Tensor, x: Tensor) -> Tensor:
    """First-order rise of the loss if a pixel takes its best colour, [B,1,H,W]; exact for a linear model."""
    return torch.maximum(gradient * (1 - x), -gradient * x).sum(1, keepdim=True)
