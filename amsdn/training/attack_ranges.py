"""Attacks of which one setting is drawn for every batch: several patch sizes, a range of pixel counts, noisy one-step sPGD.

A range is a small value, like an attack, and stands wherever a stage takes attacks. Its draws come from the host's generator,
since sizes decide the shapes of tensors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amsdn.attacks import Attack, PatchPGD, SparsePGD
from amsdn.attacks.base import Victim, require, require_at_least_one
from amsdn.attacks.losses import CROSS_ENTROPY, Goal, Loss
from amsdn.attacks.patch_attacks import Size
from amsdn.errors import InputError
from amsdn.threats import SparsePixels


@dataclass(frozen=True)
class AttackRange(ABC):
    """A description of several attacks. They are made for training: no image leaves early, the last one found is taken."""

    @abstractmethod
    def draw(self, host: torch.Generator) -> Attack:
        """One of them, by a generator on the CPU."""

    @abstractmethod
    def ends(self) -> tuple[Attack, ...]:
        """The attacks at the ends of the range, which stand for all in checks."""


TrainingAttack = Attack | AttackRange  # what a stage can train against


def _index(count: int, host: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=host))


@dataclass(frozen=True)
class PatchSizes(AttackRange):
    """Patch adversarial training with moving patches of several sizes: ``PatchPGD``, the size drawn for every batch.

    Rao, Stutz & Schiele (ECCV Workshops 2020) train against one size; several sizes keep the model from learning one outline.
    Places start at random and are searched by moves, each judged by one forward pass.
    """

    sizes: tuple[Size, ...] = (4, 5, 6, 8)  # sides of squares, or (height, width); pixels
    num_steps: int = 5
    alpha: float = 0.25
    move: Literal["random", "full", "never"] = "random"
    move_every: int = 1
    stride: int = 2
    candidates: int = 1

    def __post_init__(self) -> None:
        if not self.sizes:
            raise InputError("PatchSizes: needs at least one size")
        self.ends()

    def sized(self, size: Size) -> PatchPGD:
        """The attack of that size."""
        return PatchPGD(
            size, self.num_steps, self.alpha, self.move, self.move_every, self.stride, self.candidates, stop_when_fooled=False
        )  # fmt: skip

    def draw(self, host: torch.Generator) -> PatchPGD:
        return self.sized(self.sizes[_index(len(self.sizes), host)])

    def ends(self) -> tuple[PatchPGD, ...]:
        return tuple(self.sized(size) for size in self.sizes)


@dataclass(frozen=True)
class PixelCounts(AttackRange):
    """sPGD with the number of pixels drawn uniformly from ``fewest`` to ``most`` for every batch.

    Zhong, Huang & Liu (ICML 2024) train with one k, six times that of the evaluation, and patience 10.
    """

    fewest: int = 5
    most: int = 120
    num_steps: int = 5
    alpha: float = 0.25
    beta: float = 0.25
    patience: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise InputError(f"PixelCounts: needs 1 <= fewest <= most, got {self.fewest} and {self.most}")
        self.ends()

    def counting(self, k: int) -> SparsePGD:
        """The attack on that many pixels."""
        return SparsePGD(k, self.num_steps, alpha=self.alpha, beta=self.beta, patience=self.patience, stop_when_fooled=False)

    def draw(self, host: torch.Generator) -> SparsePGD:
        return self.counting(self.fewest + _index(self.most - self.fewest + 1, host))

    def ends(self) -> tuple[SparsePGD, ...]:
        return self.counting(self.fewest), self.counting(self.most)


@dataclass(frozen=True)
class OneStepSparse(AttackRange):
    """The attack of Fast-LS-l0 (Zhong, Huang & Liu, NeurIPS 2025): random sparse noise, then one step of sPGD.

    ``k`` is six times the k of the evaluation (120 for 20 in the authors' sPGD code, which also draws one of its two gradients
    for every batch: ``projected=None``). Step sizes of 1 and noise on 0 to 2k pixels are as FIELD.md gives them from the paper,
    whose text we could not open to check. It costs one forward and one backward pass. The whole method adds TRADES and
    self-adaptive labels, which smooth the loss; one step alone overfits to its own places.
    """

    k: int = 120  # pixels
    noise: float = 2.0  # the most pixels of noise, in multiples of k; 0: none
    projected: bool | None = None  # None: either, drawn for every batch

    def __post_init__(self) -> None:
        self.ends()

    def stepping(self, projected: bool) -> "NoisySparseStep":
        """The attack with that gradient."""
        return NoisySparseStep(self.k, self.noise, projected)

    def draw(self, host: torch.Generator) -> "NoisySparseStep":
        coin = bool(_index(2, host))
        return self.stepping(coin if self.projected is None else self.projected)

    def ends(self) -> tuple["NoisySparseStep", ...]:
        return (self.stepping(False), self.stepping(True)) if self.projected is None else (self.stepping(self.projected),)


@dataclass(frozen=True)
class NoisySparseStep(Attack):
    """One step of sPGD on ``k`` pixels, from an image with random noise on up to ``noise`` x k pixels; for training.

    Every image draws its own number of noisy pixels, uniform from 0 to noise x k, and changes them by magnitudes drawn as sPGD
    draws its own, U(-1,1) kept in the box. The noise stays in the result, as in N-FGSM (de Jorge et al., NeurIPS 2022), so the
    threat declared is k + noise x k pixels.
    """

    k: int = 120  # pixels
    noise: float = 2.0  # in multiples of k
    projected: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    loss: Loss = CROSS_ENTROPY

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "k")
        require(self.noise >= 0, self, "noise must not be negative", self.noise)
        self._step()

    @property
    def threat(self) -> SparsePixels:
        return SparsePixels(self.k + self._most)

    @property
    def _most(self) -> int:
        return round(self.noise * self.k)

    def _step(self) -> SparsePGD:
        return SparsePGD(self.k, 1, self.projected, self.alpha, self.beta, loss=self.loss, stop_when_fooled=False)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        return self._step().perturb(victim, self._noisy(x, generator) if self._most else x, goal, generator)

    def _noisy(self, x: Tensor, generator: torch.Generator) -> Tensor:
        counts = torch.randint(self._most + 1, (len(x), 1), generator=generator, device=x.device)
        rank = torch.rand(len(x), x[0, 0].numel(), generator=generator, device=x.device).argsort(1).argsort(1)
        noise = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
        return torch.where((rank < counts).reshape(-1, 1, *x.shape[2:]), (x + noise).clamp(0, 1), x)
