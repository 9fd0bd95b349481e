"""Black-box random search for sparse and patch threats, after Sparse-RS (Croce et al., AAAI 2022).

One loop: propose a change to every active sample, query, keep what is no worse. All samples of a batch move in step,
without a loop over samples. The margin is the loss, so a positive value is a success. Ties are accepted (the
original asks for a strict gain), which lets the search drift on plateaus that a quantising defence makes.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require, require_bounded
from amsdn.attacks.losses import MARGIN, Goal, Loss
from amsdn.threats import SparsePixels, ThreatModel

State = tuple[Tensor, ...]  # what is searched over, first dimension the samples

SPARSE_STAGES = (50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the last query of each stage but the last, for pixels
SPARSE_DIVISORS = (2, 4, 5, 6, 8, 10, 12, 15, 20)


class _RandomSearch(Attack):
    """The search loop; subclasses say what a state is, how it changes and how it looks on the image."""

    num_queries: int  # declared for the loop; the fields are the subclasses', so that the budget comes first
    alpha_init: float
    loss: Loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_queries >= 1, self, "num_queries must be at least 1", self.num_queries)
        require(0 < self.alpha_init <= 1, self, "alpha_init must lie in (0, 1]", self.alpha_init)

    @property
    def needs_gradients(self) -> bool:
        return False

    @abstractmethod
    def start(self, x: Tensor, threat: ThreatModel, generator: torch.Generator) -> State:
        """A random state for each image; ``threat`` is that of these images."""

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
            new = self.propose(state, query, active.x, generator) if query else self.start(x, active.threat, generator)
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
    """Sparse-RS for pixels: k pixels with colours in {0,1}^3; each query gives up a share of them and draws as many anew.

    The share is ``alpha_init`` / {2, 4, 5, 6, 8, 10, 12, 15, 20}, changing after queries 50, 200, 500, 1000, 2000, 4000,
    6000 and 8000 of 10,000 (rescaled to ``num_queries``), rounded down to whole pixels but at least one. An image costs at
    most ``num_queries`` forward passes. The authors use ``alpha_init`` .3 (README) and .8 (their code, Sparse AutoAttack).

    As in their code, one draw serves the whole batch: it chooses places in each image's own random order of its pixels.
    A state is (order [B,HW], whose first k pixels are the changed ones; image [B,3,HW]; k [B]).

    Deviations: ties are accepted; a pixel given up may be drawn again, for a new colour, without which the search ends at the
    right places with a wrong colour (at k = 1 often); towards a target the loss is the margin, the authors' is cross-entropy.
    """

    k: int = 20  # pixels; a tensor [B] gives one budget per image
    num_queries: int = 10_000
    alpha_init: float = 0.8
    loss: Loss = MARGIN

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bounded(self)

    @property
    def threat(self) -> SparsePixels:
        return SparsePixels(self.k)

    def start(self, x: Tensor, threat: ThreatModel, generator: torch.Generator) -> State:
        image, pixels = x.flatten(2), x[0, 0].numel()
        k = torch.as_tensor(threat.budget, device=x.device).long().clamp(max=pixels).expand(len(x))
        order = torch.rand(len(x), pixels, generator=generator, device=x.device).argsort(dim=1)
        changed = order.unsqueeze(1).expand(-1, 3, -1)
        colours = _corner_colours(image.shape, x, generator)
        first = (torch.arange(pixels, device=x.device) < k.unsqueeze(1)).unsqueeze(1)
        return order, image.scatter(2, changed, torch.where(first, colours, image.gather(2, changed))), k

    def propose(self, state: State, query: int, x: Tensor, generator: torch.Generator) -> State:
        order, image, k = state
        least, most = (min(bound, order.shape[1]) for bound in self._bounds)
        share, free = self.alpha_init / sparse_divisor(query, self.num_queries), (order.shape[1] - k).unsqueeze(1)
        count, few, width = (share * k.double()).long().clamp(min=1).unsqueeze(1), max(int(share * least), 1), max(int(share * most), 1)
        out = distinct(k, least, most, width, generator)
        choices = order.shape[1] - most + width, order.shape[1] - least + few  # the share is at most a half: more k, fewer choices
        into = distinct((free + count).squeeze(1), *choices, width, generator)
        into = torch.where(into < free, k.unsqueeze(1) + into, out)  # beyond the free pixels lie those just given up
        nth = torch.arange(width, device=x.device)
        colours = _corner_colours((len(x), 3, width), x, generator)
        nth = torch.where(nth < count, nth, 0)  # places beyond an image's own count repeat its first
        out, into, colours = out.gather(1, nth), into.gather(1, nth), colours.gather(2, nth.unsqueeze(1).expand_as(colours))
        left, entered = order.gather(1, out), order.gather(1, into)
        there, here = (pixel.unsqueeze(1).expand(-1, 3, -1) for pixel in (left, entered))
        image = image.scatter(2, there, x.flatten(2).gather(2, there)).scatter(2, here, colours)
        return order.scatter(1, out, entered).scatter(1, into, left), image, k

    def render(self, state: State, x: Tensor) -> Tensor:
        return state[1].reshape(x.shape)

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        """The smallest and the largest budget of the batch; kept, since asking a tensor waits for the device."""
        low, high = torch.aminmax(torch.as_tensor(self.k))
        return int(low), int(high)


def sparse_divisor(query: int, num_queries: int) -> int:
    """What the initial share is divided by at ``query`` (0 is the start, which proposes nothing) of ``num_queries``."""
    rescaled = query * 10_000 // num_queries
    return SPARSE_DIVISORS[sum(rescaled > last for last in SPARSE_STAGES)]


def distinct(below: Tensor, least: int, most: int, width: int, generator: torch.Generator) -> Tensor:
    """For each row of below [B] a draw of ``width`` different numbers under it, every such sequence as likely, [B,width].

    All rows read the same random order of 0..most-1 and skip what is too large for them, so the cost hardly grows with
    the batch; ``least`` <= below <= ``most``. A row that offers fewer than ``width`` numbers ends in zeros.
    """
    shared = torch.randperm(most, generator=generator, device=below.device)[: width + most - least]
    if least == most:
        return F.pad(shared, (0, width - len(shared))).expand(len(below), -1)
    fits = shared < below.unsqueeze(1)
    column = torch.where(fits, (fits.cumsum(1) - 1).clamp(max=width), width)  # the last column takes what is not wanted
    return column.new_zeros(len(below), width + 1).scatter_(1, column, shared.expand_as(column))[:, :width]


def _corner_colours(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform over {0, 1}, float32."""
    return torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype)
