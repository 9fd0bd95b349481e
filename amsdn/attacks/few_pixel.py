"""The one-pixel attack and its few-pixel form: differential evolution over positions and colours, black box."""

from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import Attack, Victim, require, require_at_least_one
from amsdn.attacks.losses import MARGIN, Goal, Loss
from amsdn.threats import SparsePixels

GENES = 5  # of a pixel: row and column in 0..1 of the image's sides, red, green, blue in 0..1


@dataclass(frozen=True)
class FewPixelDE(Attack):
    """One-pixel attack (Su, Vargas & Sakurai, IEEE TEVC 2019): DE/rand/1 with F = 0.5 and no crossover.

    A candidate is (row, column, r, g, b) for each of ``k`` pixels. Every child a + F (b - c), of three other members of
    the population drawn at random, competes with the parent of its own index alone. As in the paper, places start uniform
    and colours normal around grey with the deviation of half the range, 400 candidates evolve for 100 generations:
    (``num_steps`` + 1) x ``population`` forward passes for an image that stands, 40,400 by default.

    Candidates are queried ``chunk`` images at a time over the batch and the population together, and an image leaves after
    the first such call that fooled it, where the paper ends a generation; two pixels of a candidate may coincide.

    Deviations: fitness is the margin, which is what success means (``CROSS_ENTROPY`` ranks candidates by the probability
    of the label or the target, as the paper does); the paper is silent on children outside the box: here colours stop at
    its walls, where most of what fools lies, and places bounce back, so that none gather at the image's border.
    """

    k: int = 1  # pixels
    population: int = 400
    num_steps: int = 100  # generations after the first
    factor: float = 0.5
    chunk: int = 512
    loss: Loss = MARGIN

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.k, int), self, "k must be one whole number for all images", self.k)
        require(self.population >= 4, self, "population must be at least 4", self.population)
        require(self.factor > 0, self, "factor must be positive", self.factor)
        require_at_least_one(self, "num_steps", "chunk")

    @property
    def threat(self) -> SparsePixels:
        return SparsePixels(self.k)

    @property
    def needs_gradients(self) -> bool:
        return False

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        genes = self._first(x, generator)
        fitness = torch.full(genes.shape[:2], -torch.inf, device=x.device)
        for generation in range(self.num_steps + 1):
            children = self._children(genes, generator) if generation else genes.clone()
            first = 0
            while first < self.population:
                some = slice(first, first + max(self.chunk // len(active), 1))
                images = render(children[:, some], active.x)
                count = images.shape[1]
                repeated = torch.arange(len(active), device=x.device).repeat_interleave(count)
                logits = active.victim.select(repeated).logits(images.flatten(0, 1))
                loss = self.loss(logits, active.goal.select(repeated)).unflatten(0, (-1, count))
                fitter = loss >= fitness[:, some]
                genes[:, some] = torch.where(fitter[..., None, None], children[:, some], genes[:, some])
                fitness[:, some] = torch.where(fitter, loss, fitness[:, some])
                reached = active.goal.select(repeated).reached(logits).unflatten(0, (-1, count))
                at = torch.arange(len(active), device=x.device), _choose(loss, reached)
                stay = active.record(images[at], loss[at], logits.unflatten(0, (-1, count))[at])
                if stay is not None:
                    if not len(active):
                        return active.result()
                    genes, children, fitness = genes[stay], children[stay], fitness[stay]
                first += count
        return active.result()

    def _first(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The first generation, [B,P,k,5]."""
        shape = len(x), self.population, self.k
        place = torch.rand(*shape, 2, generator=generator, device=x.device)
        colour = 0.5 + 0.5 * torch.randn(*shape, 3, generator=generator, device=x.device)
        return torch.cat([place, colour.clamp(0, 1)], -1)

    def _children(self, genes: Tensor, generator: torch.Generator) -> Tensor:
        """A child for every member, genes [B,P,k,5] -> [B,P,k,5]."""
        a, b, c = (
            genes.gather(1, other[..., None, None].expand_as(genes)) for other in others(genes.shape[0], genes.shape[1], genes, generator)
        )
        place, colour = (a + self.factor * (b - c)).split([2, 3], -1)
        bounced = 1 - (place.remainder(2) - 1).abs()
        return torch.cat([bounced, colour.clamp(0, 1)], -1)


def render(genes: Tensor, x: Tensor) -> Tensor:
    """genes [B,P,k,5], x [B,3,H,W] -> the candidates' images [B,P,3,H,W]; of two colours for one pixel the later counts."""
    height, width = x.shape[2:]
    row = (genes[..., 0] * height).long().clamp(max=height - 1)
    column = (genes[..., 1] * width).long().clamp(max=width - 1)
    where = (row * width + column).unsqueeze(-2).expand(-1, -1, 3, -1)  # [B,P,3,k]
    colour = genes[..., 2:].transpose(2, 3)
    flat = x.flatten(2).unsqueeze(1).repeat(1, genes.shape[1], 1, 1)
    for pixel in range(genes.shape[2]):  # one at a time: one write with repeated indices would have no fixed order
        flat.scatter_(3, where[..., pixel : pixel + 1], colour[..., pixel : pixel + 1])
    return flat.unflatten(3, (height, width))


def others(batch: int, population: int, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """For each of [B,P] members three more of its population, all four different and every choice as likely."""

    def draw(limit: int) -> Tensor:
        return torch.randint(limit, (batch, population), generator=generator, device=like.device)

    a, b, c = draw(population - 1), draw(population - 2), draw(population - 3)
    b = b + (b >= a)  # skip what is taken, in ascending order
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= low)
    c = c + (c >= high)
    own = torch.arange(population, device=like.device)
    first, second, third = ((own + 1 + offset) % population for offset in (a, b, c))
    return first, second, third


def _choose(loss: Tensor, reached: Tensor) -> Tensor:
    """The best candidate of each row [B,P], among those that reach the goal if any does, [B]."""
    eligible = reached | ~reached.any(1, keepdim=True)
    return loss.masked_fill(~eligible, -torch.inf).argmax(1)
