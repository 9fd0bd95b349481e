"""Double masking: a prediction that no patch can change wherever the image is certified.

PatchCleanser (Xiang, Mahloujifar & Mittal, USENIX Security 2022), Algorithm 1. With P[i][j] the class under masks i and j:

1. If all one-mask predictions P[i][i] agree, that is the answer.
2. Else, for each mask i in order whose P[i][i] differs from the majority: if P[i][j] = P[i][i] for every j, that is the answer.
3. Else the answer is the majority.

If P[i][j] is the true label for every pair on the clean image, then so is the answer on every image that differs from it
only inside a patch that some mask covers (their Theorem 1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amsdn.errors import InputError
from amsdn.protocols import is_stochastic, surrogate_of
from amsdn.utils.masking import covering_masks, mask_pairs, masked_views

GREY = (0.5, 0.5, 0.5)


class DoubleMasking(nn.Module):
    """Any classifier, answering by double masking. images [B,3,H,W] of any size -> logits [B,K] whose argmax is the answer.

    ``patch`` is what one mask must be able to cover: the side of a square, or (height, width). ``fill`` is the colour of
    covered pixels, which should be the one that the classifier was trained with. At most ``views_per_pass`` masked views
    are in memory at once.

    Forward passes of the classifier per image: M for the first round; M more for each disagreeing mask that is looked at,
    and fewer where one is refuted early. The outcome for one image does not depend on its batch.
    """

    fill: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        patch: int | tuple[int, int],
        masks_per_axis: int = 6,
        fill: tuple[float, float, float] = GREY,
        views_per_pass: int = 128,
    ) -> None:
        super().__init__()
        self.patch = (patch, patch) if isinstance(patch, int) else patch
        if min(self.patch) < 1 or masks_per_axis < 1 or views_per_pass < 1:
            raise InputError(
                f"DoubleMasking: patch, masks_per_axis and views_per_pass must be at least 1, got {patch}, {masks_per_axis}, {views_per_pass}"
            )
        if not all(0 <= value <= 1 for value in fill):
            raise InputError(f"DoubleMasking: fill must be a colour in [0,1], got {fill}")
        self.classifier, self.masks_per_axis, self.views_per_pass = classifier, masks_per_axis, views_per_pass
        self.register_buffer("fill", torch.tensor(fill).reshape(1, 3, 1, 1), persistent=False)
        self.train(classifier.training)

    @property
    def stochastic(self) -> bool:
        """Whether the classifier is random; the certificate then means nothing."""
        return is_stochastic(self.classifier)

    def masks(self, height: int, width: int, /) -> Tensor:
        """The covering set for images of this size, [M,1,H,W] bool, True where a mask covers. InputError if the patch does not fit."""
        if self.patch[0] > height or self.patch[1] > width:
            raise InputError(f"DoubleMasking: a {self.patch[0]}x{self.patch[1]} patch does not fit images of {height}x{width}")
        return covering_masks(height, width, self.patch, self.masks_per_axis, self.fill.device)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] -> log-probabilities [B,K] whose argmax is the answer: two parts the answer, one part the mean over one-mask views.

        The second part moves with the image while the answer stands, which is what margins and detection scores need.
        """
        masks = self.masks(*x.shape[2:])
        logits = self._first_round(x, masks)
        answer = self._second_round(x, masks, logits.argmax(2), logits.shape[2])
        chosen = F.one_hot(answer, logits.shape[2]) == 1
        mean = _mean_log_probability(logits)
        return torch.where(chosen, torch.logaddexp(mean, mean.new_tensor(math.log(2))), mean) - math.log(3)

    @torch.no_grad()
    def certified(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether all two-mask predictions on x [B,3,H,W] are y [B], [B] bool: then no covered patch changes the answer y."""
        masks = self.masks(*x.shape[2:])
        first, second = mask_pairs(len(masks), x.device)
        return self._all_answer(x, masks, first.expand(len(x), -1), second.expand(len(x), -1), y)

    @torch.no_grad()
    def prediction_table(self, x: Tensor) -> Tensor:
        """P of the module's docstring for x [B,3,H,W], [B,M,M] int64: M (M + 1) / 2 passes an image."""
        masks = self.masks(*x.shape[2:])
        first, second = mask_pairs(len(masks), x.device)
        rows = torch.arange(len(x), device=x.device).repeat_interleave(len(first))
        answers = self._logits(x, masks, rows, first.repeat(len(x)), second.repeat(len(x))).argmax(1).reshape(len(x), -1)
        table = answers.new_empty(len(x), len(masks), len(masks))
        table[:, first, second] = answers
        table[:, second, first] = answers
        return table

    def differentiable_surrogate(self) -> nn.Module:
        """The mean over one-mask views alone, through the classifier's own surrogate where it has one."""
        return MaskAverage(self)

    def _first_round(self, x: Tensor, masks: Tensor) -> Tensor:
        """Logits under each single mask, [B,M,K]."""
        own = torch.arange(len(masks), device=x.device).repeat(len(x))
        rows = torch.arange(len(x), device=x.device).repeat_interleave(len(masks))
        return self._logits(x, masks, rows, own, own).reshape(len(x), len(masks), -1)

    def _second_round(self, x: Tensor, masks: Tensor, votes: Tensor, classes: int) -> Tensor:
        """The answers [B] given the one-mask predictions ``votes`` [B,M]: looks only at the pairs that ``answer`` would need."""
        result = majority(votes, classes)
        untried = votes != result.unsqueeze(1)
        every = torch.arange(len(masks), device=x.device)
        while len(rows := untried.any(1).nonzero().squeeze(1)):
            mask = untried[rows].int().argmax(1)  # the next disagreer of each image
            vote = votes[rows, mask]
            pairs = mask.unsqueeze(1).expand(-1, len(masks)), every.expand(len(rows), -1)
            confirmed = self._all_answer(x[rows], masks, *pairs, vote)
            result[rows[confirmed]] = vote[confirmed]
            untried[rows, mask] = False
            untried[rows[confirmed]] = False
        return result

    def _all_answer(self, x: Tensor, masks: Tensor, first: Tensor, second: Tensor, label: Tensor) -> Tensor:
        """Whether every view of image b under masks ``first[b]`` and ``second[b]`` [B,N] is called ``label[b]``, [B] bool.

        Blocks of views shrink and grow with the images that still hold, so that a pass is full and a refuted image costs no more.
        """
        holds = torch.ones(len(x), dtype=torch.bool, device=x.device)
        start, pairs = 0, first.shape[1]
        while start < pairs and len(rows := holds.nonzero().squeeze(1)):
            stop = min(start + max(self.views_per_pass // len(rows), 1), pairs)
            views = rows.repeat_interleave(stop - start)
            answers = self._logits(x, masks, views, first[rows, start:stop].flatten(), second[rows, start:stop].flatten()).argmax(1)
            holds[rows] = (answers.reshape(len(rows), -1) == label[rows].unsqueeze(1)).all(1)
            start = stop
        return holds

    def _logits(self, x: Tensor, masks: Tensor, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Logits [N,K] of view n: image ``rows[n]`` under masks ``first[n]`` and ``second[n]``; ``views_per_pass`` at a time."""
        chunks = zip(*(t.split(self.views_per_pass) for t in (rows, first, second)), strict=True)
        return torch.cat([self.classifier(masked_views(x[r], masks, i, j, self.fill)).float() for r, i, j in chunks])


class MaskAverage(nn.Module):
    """images [B,3,H,W] -> log of the mean probability over the one-mask views [B,K]: differentiable, with flat memory.

    It agrees with double masking where the one-mask predictions are unanimous, and mostly elsewhere. Passes that are not the
    only one are computed again in the backward pass instead of being kept.
    """

    def __init__(self, defence: DoubleMasking) -> None:
        super().__init__()
        self.defence = defence
        self.through = surrogate_of(defence.classifier) or defence.classifier
        self.train(defence.training)

    def forward(self, x: Tensor) -> Tensor:
        masks = self.defence.masks(*x.shape[2:])
        own = torch.arange(len(masks), device=x.device).repeat(len(x)).split(self.defence.views_per_pass)
        rows = torch.arange(len(x), device=x.device).repeat_interleave(len(masks)).split(self.defence.views_per_pass)

        def look(x: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
            return self.through(masked_views(x[rows], masks, mask, mask, self.defence.fill)).float()

        if len(rows) == 1 or not torch.is_grad_enabled():
            logits = [look(x, r, i) for r, i in zip(rows, own, strict=True)]
        else:
            logits = [checkpoint(look, x, r, i, use_reentrant=False) for r, i in zip(rows, own, strict=True)]
        return _mean_log_probability(torch.cat(logits).reshape(len(x), len(masks), -1))


def majority(votes: Tensor, classes: int) -> Tensor:
    """The class [B] of most votes [B,M]; of several, the smallest index (the paper leaves ties open, the proof does not care)."""
    return F.one_hot(votes, classes).sum(1).argmax(1)


def answer(table: Tensor, classes: int) -> Tensor:
    """Algorithm 1 on complete, symmetric tables P [B,M,M] of two-mask predictions -> answers [B].

    The order of the disagreers makes no difference: masks i and k cannot confirm different classes, since P[i][k] = P[k][i].
    """
    votes = table.diagonal(dim1=1, dim2=2)
    most = majority(votes, classes)
    confirmed = (votes != most.unsqueeze(1)) & (table == votes.unsqueeze(2)).all(2)
    first = confirmed.int().argmax(1, keepdim=True)
    return torch.where(confirmed.any(1), votes.gather(1, first).squeeze(1), most)


def _mean_log_probability(logits: Tensor) -> Tensor:
    """logits [B,M,K] -> log of the mean over M of the class probabilities, [B,K]; small ones keep their precision."""
    return logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])
