"""Black-box random search for sparse and patch threats, after Sparse-RS (Croce et al., AAAI 2022).

One loop: propose a change to every active sample, query, keep what is no worse. All samples of a batch move in step,
without a loop over samples. The margin is the loss, so a positive value is a success. Ties are accepted (the
original asks for a strict gain), which lets the search drift on plateaus that a quantising defence makes.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require
from amsdn.attacks.losses import MARGIN, Goal, Loss
from amsdn.attacks.patch_attacks import paste
from amsdn.threats import PatchRegion, SparsePixels, square_mask

State = tuple[Tensor, ...]  # what is searched over, first dimension the samples

# Query (out of 10,000) from which a stage of the schedule holds.
STAGES = (0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
SPARSE_DIVISORS = (1, 2, 4, 5, 6, 8, 10, 12, 15, 20)


def stage(query: int, num_queries: int) -> int:
    """The index of the schedule's stage at ``query`` of ``num_queries``, rescaled to 10,000."""
    rescaled = query * 10_000 // num_queries
    return sum(rescaled >= start for start in STAGES) - 1


class _RandomSearch(Attack):
    """The search loop; subclasses say what a state is, how it changes and how it looks on the image."""

    num_queries: int  # declared for the loop; the fields are the subclasses', so that the budget comes first
    alpha_init: float
    loss: Loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_queries >= 1, self, "num_queries must be at least 1", self.num_queries)
        require(0 < self.alpha_init <= 1, self, "alpha_init must lie in (0, 1]", self.alpha_init)

    @abstractmethod
    def start(self, x: Tensor, generator: torch.Generator) -> State:
        """A random state for each image."""

    @abstractmethod
    def propose(self, state: State, query: int, x: Tensor, generator: torch.Generator) -> State:
        """A changed copy of the state for the given query."""

    @abstractmethod
    def render(self, state: State, x: Tensor) -> Tensor:
        """The images that the state stands for, [B,3,H,W]."""

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        state: State = ()
        best = torch.full((len(x),), -torch.inf, device=x.device)
        for query in range(self.num_queries):
            new = self.propose(state, query, active.x, generator) if query else self.start(x, generator)
            x_adv = self.render(new, active.x)
            loss, logits = active.query(x_adv, self.loss)
            stay = active.record(x_adv, loss, logits)
            accept = loss >= best
            best = torch.where(accept, loss, best)
            state = tuple(torch.where(accept.reshape(-1, *[1] * (n.ndim - 1)), n, s) for n, s in zip(new, state or new, strict=True))
            if stay is not None:
                if not len(active):
                    break
                best, state = best[stay], tuple(s[stay] for s in state)
        return active.result()


@dataclass(frozen=True)
class SparseRS(_RandomSearch):
    """Sparse-RS for pixels: k positions with colours in {0,1}^3; each query moves and recolours a share of them.

    The share is ``alpha_init`` / {1, 2, 4, 5, 6, 8, 10, 12, 15, 20} as queries go by, at least one pixel.
    A state is (positions [B,k] in 0..HW-1, colours [B,3,k]).
    """

    k: int = 20
    num_queries: int = 10_000
    alpha_init: float = 0.8
    loss: Loss = MARGIN

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.k, int), self, "k must be one whole number for all images", self.k)

    @property
    def threat(self) -> SparsePixels:
        return SparsePixels(self.k)

    def start(self, x: Tensor, generator: torch.Generator) -> State:
        pixels = x[0, 0].numel()
        where = _rand((len(x), pixels), x, generator).topk(min(self.k, pixels), dim=1).indices
        return where, _corner_colours((len(x), 3, where.shape[1]), x, generator)

    def propose(self, state: State, query: int, x: Tensor, generator: torch.Generator) -> State:
        where, colours = state
        k, free = where.shape[1], x[0, 0].numel() - where.shape[1]
        share = self.alpha_init / SPARSE_DIVISORS[stage(query, self.num_queries)]
        count = max(int(share * k), 1)
        slots = _rand(where.shape, x, generator).topk(count, dim=1).indices
        new_colours = _corner_colours((len(x), 3, count), x, generator)
        colours = colours.scatter(2, slots.unsqueeze(1).expand(-1, 3, -1), new_colours)
        moved = min(count, free)  # fewer pixels than wanted are free only if k is most of the image
        if moved:
            priority = _rand((len(x), k + free), x, generator).scatter_(1, where, -1.0)
            where = where.scatter(1, slots[:, :moved], priority.topk(moved, dim=1).indices)
        return where, colours

    def render(self, state: State, x: Tensor) -> Tensor:
        where, colours = state
        return x.flatten(2).scatter(2, where.unsqueeze(1).expand(-1, 3, -1), colours).reshape(x.shape)


@dataclass(frozen=True)
class PatchRS(_RandomSearch):
    """Patch-RS: a square of colours in {0,1}^3, recoloured in random sub-squares, and shifted every fourth query.

    A sub-square has side sqrt(share) x size, where the share is ``alpha_init`` halved at each stage of the schedule;
    a single pixel flips one channel. A shift is uniform within 0.75 x (image side) x (queries left / all).
    A state is (content [B,3,s,s], corner [B,2] as row and column).
    """

    size: int = 5
    num_queries: int = 10_000
    alpha_init: float = 0.4
    shift_every: int = 4
    loss: Loss = MARGIN

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shift_every >= 1, self, "shift_every must be at least 1", self.shift_every)

    @property
    def threat(self) -> PatchRegion:
        return PatchRegion(self.size)

    def start(self, x: Tensor, generator: torch.Generator) -> State:
        corner = torch.stack(self.threat.random_corners(x, generator), 1)
        content = _corner_colours((len(x), 3, 1, 1), x, generator).expand(-1, -1, self.size, self.size)
        for side in range(self.size - 1, 0, -1):  # a few blocks of every size: structure at all scales
            content = self._recolour(content, side, generator)
        return content, corner

    def propose(self, state: State, query: int, x: Tensor, generator: torch.Generator) -> State:
        content, corner = state
        if query % self.shift_every == 0:
            return content, self._shift(corner, query, x, generator)
        share = self.alpha_init / 2 ** stage(query, self.num_queries)
        side = max(round((share * self.size**2) ** 0.5), 1)
        return (self._recolour(content, side, generator) if side > 1 else self._flip(content, generator)), corner

    def render(self, state: State, x: Tensor) -> Tensor:
        return paste(x, *state)

    def _recolour(self, content: Tensor, side: int, generator: torch.Generator) -> Tensor:
        corners = torch.randint(self.size - side + 1, (2, len(content)), generator=generator, device=content.device)
        colour = _corner_colours((len(content), 3, 1, 1), content, generator)
        return torch.where(square_mask(corners[0], corners[1], side, content), colour, content)

    def _flip(self, content: Tensor, generator: torch.Generator) -> Tensor:
        flat = content.flatten(1)
        value = torch.randint(flat.shape[1], (len(flat), 1), generator=generator, device=flat.device)
        return flat.scatter(1, value, 1 - flat.gather(1, value)).reshape(content.shape)

    def _shift(self, corner: Tensor, query: int, x: Tensor, generator: torch.Generator) -> Tensor:
        reach = max(int(0.75 * max(x.shape[2:]) * (1 - query / self.num_queries)), 1)
        by = torch.randint(-reach, reach + 1, corner.shape, generator=generator, device=corner.device)
        limit = torch.tensor(x.shape[2:], device=corner.device) - self.size
        return torch.minimum((corner + by).clamp(min=0), limit)


def _rand(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device)


def _corner_colours(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform over {0, 1}, float32."""
    return torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype)
