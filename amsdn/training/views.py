"""How much of every batch is seen as what a certificate will ask, and what the model's answers to these views cost.

The single kinds of views are in ``amsdn.training.view_kinds``; ``CertifiableViews`` divides a batch among them, in any stage that
learns from labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.training.objectives import accuracy, divergence, mean_answer_entropy, noise_consistency
from amsdn.training.smooth_adversary import SmoothAdversary
from amsdn.training.stage import StepOutput
from amsdn.training.view_kinds import GaussianViews, GreedyCutout, PixelParts, View, deployed

__all__ = ["CertifiableViews", "Drawn", "GaussianViews", "GreedyCutout", "PixelParts", "SmoothAdversary", "View", "deployed"]


@dataclass(frozen=True)
class CertifiableViews:
    """How much of every batch is seen as what. Shares are of all images; the rest of the batch is the stage's own business.

    Masked images are divided evenly among ``cutouts``, one for each mask set a certificate will be asked of. With
    ``consistency`` above 0 a noisy image is seen twice (or ``copies`` times), and the answers are made to agree (Jeong and Shin,
    NeurIPS 2020, who take consistency 10 and entropy .5). With ``unmasked_pull`` the answer under masks is pulled to the deployed
    model's answer to the whole image, KL(whole || masked), which costs one forward pass of those images; no gradient flows
    into the whole image's answer.
    """

    noised: float = 0.0
    masked: float = 0.0
    ablated: float = 0.0
    sigmas: tuple[float, ...] = (0.12, 0.25)  # standard deviations of the noise, in [0,1] pixel units
    copies: int | None = None  # noisy copies of an image; None: two where they are to agree, else one
    consistency: float = 0.0  # weight of the copies' agreement
    entropy: float = 0.0  # weight of the entropy of the copies' mean answer, beside their agreement
    smooth_adversary: SmoothAdversary = SmoothAdversary()  # against the noisy copies; none by default
    cutouts: tuple[GreedyCutout, ...] = (GreedyCutout(candidates=1),)
    unmasked_pull: float = 0.0  # weight of the agreement of masked and whole images
    parts: PixelParts = PixelParts()

    def __post_init__(self) -> None:
        shares = (self.noised, self.masked, self.ablated)
        if not min(shares) >= 0 or not self.share < 1:
            raise InputError(f"views: noised, masked and ablated must be at least 0 and leave some images, got {shares}; make them smaller")
        weights = (self.consistency, self.entropy, self.unmasked_pull)
        if not min(weights) >= 0 or not self.cutouts:
            raise InputError(
                "views: consistency, entropy and unmasked_pull must be at least 0 and cutouts must not be empty, "
                f"got {weights} and {self.cutouts}"
            )
        if self.noise().copies < 2 and (self.consistency or self.entropy):
            raise InputError(f"views: a single noisy copy has nothing to agree with; use copies of 2 or more, got {self.copies}")

    @property
    def share(self) -> float:
        """Of all images, how many are seen as a view."""
        return self.noised + self.masked + self.ablated

    def at(self, progress: float) -> Self:
        """The views of that share of the run: what has a warm-up is as strong as it is then."""
        return replace(self, smooth_adversary=self.smooth_adversary.at(progress))

    def noise(self) -> GaussianViews:
        """The noisy views."""
        copies = (2 if self.consistency or self.entropy else 1) if self.copies is None else self.copies
        return GaussianViews(self.sigmas, copies, self.smooth_adversary)

    def kinds(self) -> tuple["Kind", ...]:
        """The kinds of views there are, in the order in which they take images."""
        # The smoothed classifier votes by hard labels and Cohen et al. train on plain cross-entropy: noise takes no label smoothing.
        return (
            Kind("noised", self.noised, (self.noise(),), smooth=False, consistency=self.consistency, entropy=self.entropy),
            Kind("masked", self.masked, self.cutouts, pull=self.unmasked_pull),
            Kind("ablated", self.ablated, (self.parts,)),
        )

    def draw(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> "Drawn":
        """Views of the first images of x [B,3,H,W] with labels y [B]; at least one image is left over."""
        taken, images, portions = 0, [x[:0]], []
        for kind in self.kinds():
            count = min(round(kind.share * len(x)), len(x) - 1 - taken)
            if count:
                mine = slice(taken, taken + count)
                images.append(kind(model, x[mine], y[mine], generator))
                portions.append(Portion(kind, count, len(images[-1]) // count, answer(model, x[mine]) if kind.pull else None))
                taken += count
        return Drawn(torch.cat(images), y[:taken], tuple(portions))

    def loss(self, drawn: "Drawn", logits: Tensor, label_smoothing: float) -> StepOutput:
        """What the model's ``logits`` [N,K] on the drawn views cost, averaged over their images, with metrics of each kind."""
        metrics: dict[str, Tensor] = {}
        loss, start, taken = logits.new_zeros(()), 0, 0
        for portion in drawn.portions:
            images = portion.images
            y = drawn.labels[taken : taken + images].repeat(portion.copies)
            term, found = portion.loss(logits[start : start + len(y)].float(), y, label_smoothing)
            metrics |= found
            loss = loss + images / len(drawn.labels) * term
            start, taken = start + len(y), taken + images
        return StepOutput(loss, metrics)


class Kind(NamedTuple):
    """One kind of views: its name in the metrics, its share of a batch, the views that divide its images evenly, and its weights."""

    name: str
    share: float
    views: Sequence[View]
    smooth: bool = True  # whether its labels are smoothed
    consistency: float = 0.0  # of an image's copies
    entropy: float = 0.0  # of the copies' mean answer
    pull: float = 0.0  # towards the answer to the image itself

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        portions = zip(self.views, x.tensor_split(len(self.views)), y.tensor_split(len(self.views)), strict=True)
        return torch.cat([view(model, images, labels, generator) for view, images, labels in portions if len(images)])


class Portion(NamedTuple):
    """So many images of ``Drawn``, each in ``copies`` views, copy by copy."""

    kind: Kind
    images: int
    copies: int
    whole: Tensor | None = None  # the model's logits [images,K] on the images themselves, where views are pulled to them

    def loss(self, logits: Tensor, y: Tensor, label_smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What the logits [copies * images,K] cost with labels y of the same length, a mean, and metrics."""
        kind = self.kind
        entropy = F.cross_entropy(logits, y, label_smoothing=label_smoothing if kind.smooth else 0.0)
        metrics = {f"cross_entropy_{kind.name}": entropy.detach(), f"accuracy_{kind.name}": accuracy(logits, y)}
        term = entropy
        if kind.consistency or kind.entropy:
            agreement, spread = noise_consistency(*logits.chunk(self.copies)), mean_answer_entropy(*logits.chunk(self.copies))
            term = term + kind.consistency * agreement + kind.entropy * spread
            metrics |= {"noise_consistency": agreement.detach(), "noise_entropy": spread.detach()}
        if self.whole is not None:
            distance = divergence(self.whole.repeat(self.copies, 1), logits).mean()
            term = term + kind.pull * distance
            metrics[f"divergence_{kind.name}"] = distance.detach()
        return term, metrics


class Drawn(NamedTuple):
    """Views [N,3,H,W] of the first n images of a batch, those images' labels [n], and which are of which kind."""

    images: Tensor
    labels: Tensor
    portions: tuple[Portion, ...]


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    """What the model as it is deployed says of x [B,3,H,W]: logits [B,K] float32, without gradients."""
    with deployed(model):
        logits: Tensor = model(x)
    return logits.float()
