"""Single views of training images under which the label must stand, because a certificate asks the same.

Randomized smoothing asks the model about noisy copies, double masking about images under two masks, pixel partitions about
images of which few pixels are left. A model that has never met them certifies nothing. Each is a small value, called on a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.protocols import mask_fill_of
from amsdn.training.smooth_adversary import SmoothAdversary
from amsdn.utils.masking import covering_masks, masked_views
from amsdn.utils.partition import random_part_views

VIEWS_PER_PASS = 512  # masked candidates judged at once; bounds memory, changes nothing else


class View(Protocol):
    """images [B,3,H,W] in [0,1] with labels y [B] -> views of them; draws come from ``generator`` alone."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, /) -> Tensor: ...


@dataclass(frozen=True)
class GaussianViews:
    """Every image with Gaussian noise, ``copies`` times, for randomized smoothing: [copies * B,3,H,W], all images, then all again.

    Copies of an image share its standard deviation, drawn from ``sigmas``. They are not clipped to [0,1]: the smoothed
    classifier does not clip either (Cohen et al. 2019, section 3.3, train on the very noise that certification adds). An
    ``adversary`` first moves the images to where the copies together are worst (SmoothAdv).
    """

    sigmas: tuple[float, ...] = (0.12, 0.25)  # standard deviations, in [0,1] pixel units
    copies: int = 1
    adversary: SmoothAdversary = SmoothAdversary()  # none by default

    def __post_init__(self) -> None:
        if not self.sigmas or min(self.sigmas) <= 0 or self.copies < 1:
            raise InputError(f"views: noise needs positive sigmas and at least one copy, got {self.sigmas} and {self.copies}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        device = generator.device
        pick = torch.randint(len(self.sigmas), (len(x),), generator=generator, device=device)
        sigma = torch.zeros(len(x), device=device)
        for number, value in enumerate(self.sigmas):  # a table of sigmas would have to be uploaded, and waited for
            sigma = sigma.masked_fill(pick == number, value)
        noise = torch.randn((self.copies * len(x), *x.shape[1:]), generator=generator, device=device)
        noise = (sigma.repeat(self.copies).reshape(-1, 1, 1, 1) * noise).to(x.device)
        with deployed(model):
            x = self.adversary(model, x, y, noise, generator)
        return x.repeat(self.copies, 1, 1, 1) + noise


@dataclass(frozen=True)
class GreedyCutout:
    """Two of the certificate's own masks on every image, the worst that a greedy search finds, in the model's ``mask_fill``.

    Round one keeps the mask under which the loss is greatest, round two the one that is worst together with it; both may be
    the same mask, as in a certificate's pairs (Saha et al., "Revisiting Image Classifier Training for Improved Certified
    Robust Defense against Adversarial Patches", TMLR 2023, Greedy Cutout). No gradients; the model judges as it is deployed,
    in eval mode, so nothing that training remembers moves.

    ``candidates`` is how many masks a round tries, drawn afresh for each image and round; None tries all, which is the
    paper's search over this mask set (there a coarser one than the certificate's was used to save time). 1 means two random
    masks and costs no pass of the model. With ``pairs`` there are no rounds: the worst of so many random pairs, one pass for each.
    At equal cost two pairs certified more than random masks on CIFAR-10 (results/LOG.md), where a second round is beyond a CPU's means.
    """

    patch: int | tuple[int, int] = 5  # side of the square, or height and width, that one mask must be able to cover
    masks_per_axis: int = 6
    candidates: int | None = None
    pairs: int | None = None  # instead of greedy rounds

    def __post_init__(self) -> None:
        side = self.patch if isinstance(self.patch, int) else min(self.patch)
        if min(side, self.masks_per_axis, 1 if self.candidates is None else self.candidates, 1 if self.pairs is None else self.pairs) < 1:
            raise InputError(
                "views: patch, masks_per_axis, candidates and pairs must be at least 1, "
                f"got {self.patch}, {self.masks_per_axis}, {self.candidates} and {self.pairs}"
            )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        masks, fill = self.masks(x.shape[2], x.shape[3], x.device), mask_fill_of(model).to(x)
        if self.pairs is not None:
            drawn = torch.randint(len(masks), (2, len(x), self.pairs), generator=generator, device=generator.device).to(x.device)
            first, second = drawn.gather(2, self._worst(model, x, y, masks, fill, *drawn).expand(2, -1, 1)).squeeze(2)
            return masked_views(x, masks, first, second, fill)
        tried = self._drawn(len(x), len(masks), generator).to(x.device)
        first = tried.gather(1, self._worst(model, x, y, masks, fill, tried, tried))
        tried = self._drawn(len(x), len(masks), generator).to(x.device)
        second = tried.gather(1, self._worst(model, x, y, masks, fill, first.expand_as(tried), tried))
        return masked_views(x, masks, first.squeeze(1), second.squeeze(1), fill)

    def masks(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """The masks [M,1,H,W] bool that a certificate of the same patch and count uses. InputError where the patch does not fit."""
        sides = (self.patch, self.patch) if isinstance(self.patch, int) else self.patch
        if sides[0] > height or sides[1] > width:
            raise InputError(
                f"views: masks for a {sides[0]}x{sides[1]} patch do not fit images of {height}x{width}; make the patch smaller"
            )
        return covering_masks(height, width, self.patch, self.masks_per_axis, device)

    def _drawn(self, images: int, count: int, generator: torch.Generator) -> Tensor:
        """Which of ``count`` masks each image tries, [images, candidates], all different."""
        if self.candidates is None or self.candidates >= count:
            return torch.arange(count, device=generator.device).expand(images, -1)
        return torch.rand(images, count, generator=generator, device=generator.device).topk(self.candidates).indices

    @torch.no_grad()
    def _worst(self, model: nn.Module, x: Tensor, y: Tensor, masks: Tensor, fill: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Which column [B,1] of the pairs of masks ``first`` and ``second`` [B,C] has the greatest loss."""
        if first.shape[1] == 1:
            return torch.zeros_like(first)
        rows = torch.arange(len(x), device=x.device).repeat_interleave(first.shape[1])
        with deployed(model):
            losses = [
                F.cross_entropy(model(masked_views(x[r], masks, i, j, fill)).float(), y[r], reduction="none")
                for r, i, j in zip(*(t.split(VIEWS_PER_PASS) for t in (rows, first.flatten(), second.flatten())), strict=True)
            ]
        return torch.cat(losses).reshape(first.shape).argmax(1, keepdim=True)


@dataclass(frozen=True)
class PixelParts:
    """One random part of a pixel partition of every image, what is missing interpolated, for certificates in pixels.

    The partition (rows, columns) is drawn from ``grids``. See ``amsdn.utils.partition``.
    """

    grids: tuple[tuple[int, int], ...] = ((4, 4),)

    def __post_init__(self) -> None:
        if not self.grids or min(min(grid) for grid in self.grids) < 1:
            raise InputError(f"views: pixel parts need at least one grid of at least 1x1, got {self.grids}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return random_part_views(x, self.grids, generator)


@contextmanager
def deployed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, so that no batch statistics leak into what is crafted with it; then every part as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
