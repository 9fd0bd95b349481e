"""Votes over disjoint sets of pixels: a prediction that no few pixels can change wherever the image is certified.

Feature partition aggregation (Hammoudeh & Lowd, "Provable Robustness against a Union of l0 Adversarial Attacks", AAAI 2024).
The image is split into T disjoint parts of pixels, a classifier looks at each part alone, and the parts vote in a run-off (see
``amsdn.utils.voting``). Changing one pixel, in all its channels, changes one part and so one voter.

Deviations: one shared classifier in place of T networks, so that it is one model and learns from all parts (their proof asks only
that a voter depends on no other part's pixels); the missing pixels are interpolated (see ``amsdn.utils.partition``); poisoned
training data, which T separate networks also withstand, is not covered by a shared one.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amsdn.errors import InputError
from amsdn.protocols import is_stochastic, surrogate_of
from amsdn.utils.partition import Grid, check_grid, part_views
from amsdn.utils.voting import NO_VOTE, cast_votes, changes_survived, count_votes, run_off

TOLERANCE = 1e-3


@dataclass(frozen=True)
class PartitionSettings:
    """All that the answers and the certificate depend on, besides the classifier."""

    grid: Grid
    tolerance: float


class PixelPartition(nn.Module):
    """Any classifier, answering by votes over rows * columns parts. images [B,3,H,W] of any size -> scores [B,K], argmax the answer.

    At most ``views_per_pass`` views are in memory at once. Every answer costs one forward pass of the classifier per part. A view
    with logits that are not finite votes for nobody. What the answer is does not depend on the batch, but for voters so undecided
    that rounding decides them: those within ``tolerance`` (see ``firm_votes``) are given to the adversary by the certificate.
    """

    def __init__(
        self, classifier: nn.Module, rows: int = 6, columns: int = 6, *, views_per_pass: int = 256, tolerance: float = TOLERANCE
    ) -> None:
        super().__init__()
        if min(rows, columns, views_per_pass) < 1 or not 0 <= tolerance < 1:
            raise InputError(
                "PixelPartition: rows, columns and views_per_pass must be at least 1 and tolerance in [0,1), "
                f"got {rows}, {columns}, {views_per_pass} and {tolerance}"
            )
        self.classifier, self.views_per_pass, self.tolerance = classifier, views_per_pass, tolerance
        self.grid: Grid = (rows, columns)
        self.train(classifier.training)

    @property
    def config(self) -> "PartitionSettings":
        """What identifies the defence, besides the classifier, in run folders."""
        return PartitionSettings(self.grid, self.tolerance)

    @property
    def parts(self) -> int:
        """The number of votes, T: forward passes of the classifier for each answer."""
        return self.grid[0] * self.grid[1]

    @property
    def stochastic(self) -> bool:
        """Whether the classifier is random; the certificate then means nothing."""
        return is_stochastic(self.classifier)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] -> log-probabilities [B,K] whose argmax is the answer. Raises InputError for images smaller than the grid.

        They are those of a mixture: two parts the answer, half a part the share of the first-round votes, half a part the mean
        probability over the parts. The last two move with the image while the answer stands, which is what margins and searching
        attacks need.
        """
        logits = self.part_logits(x)
        votes, classes = cast_votes(logits), logits.shape[2]
        counts = count_votes(votes, classes)
        mean = _mean_probability(logits, votes != NO_VOTE)
        share = counts / counts.sum(1, keepdim=True).clamp_min(1)
        share = torch.where(counts.any(1, keepdim=True), share, 1 / classes)
        return ((2 * F.one_hot(run_off(logits), classes) + (share + mean) / 2) / 3).clamp_min(torch.finfo(mean.dtype).tiny).log()

    @torch.no_grad()
    def certified_radius(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(answer, radius) int64 [B] for x [B,3,H,W]: no change of ``radius`` pixels changes the answer; -1 where none is sure."""
        return changes_survived(self.part_logits(x), self.tolerance)

    def part_logits(self, x: Tensor, /) -> Tensor:
        """The classifier's logits of every part's view of x [B,3,H,W], [B,T,K] float32."""
        return self._look(x, self.classifier)

    def differentiable_surrogate(self) -> nn.Module:
        """The mean over the parts alone, through the classifier's own surrogate where it has one."""
        return PartAverage(self)

    def _look(self, x: Tensor, through: nn.Module, *, recompute: bool = False) -> Tensor:
        """Logits [B,T,K] by ``through``, ``views_per_pass`` views at a time; with ``recompute``, again in the backward pass."""
        check_grid(self.grid, *x.shape[2:])
        image = torch.arange(len(x), device=x.device).repeat_interleave(self.parts).split(self.views_per_pass)
        part = torch.arange(self.parts, device=x.device).repeat(len(x)).split(self.views_per_pass)

        def look(x: Tensor, image: Tensor, part: Tensor) -> Tensor:
            return through(part_views(x[image], part, self.grid)).float()

        if recompute and len(image) > 1:
            logits = [checkpoint(look, x, i, p, use_reentrant=False) for i, p in zip(image, part, strict=True)]
        else:
            logits = [look(x, i, p) for i, p in zip(image, part, strict=True)]
        return torch.cat(logits).reshape(len(x), self.parts, -1)


class PartAverage(nn.Module):
    """images [B,3,H,W] -> log of the mean probability over the parts [B,K]: differentiable, with flat memory.

    Passes that are not the only one are computed again in the backward pass instead of being kept.
    """

    def __init__(self, defence: PixelPartition) -> None:
        super().__init__()
        self.defence = defence
        self.through = surrogate_of(defence.classifier) or defence.classifier
        self.train(defence.training)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.defence._look(x, self.through, recompute=torch.is_grad_enabled())
        return logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])


def _mean_probability(logits: Tensor, usable: Tensor) -> Tensor:
    """The mean class probabilities [B,K] over the usable [B,T] of logits [B,T,K]; uniform where none is."""
    weight = usable.unsqueeze(2).to(logits.dtype)
    probability = torch.where(usable.unsqueeze(2), logits, 0.0).softmax(2)
    mean = (probability * weight).sum(1) / weight.sum(1).clamp_min(1)
    return torch.where(usable.any(1, keepdim=True), mean, 1 / logits.shape[2])
