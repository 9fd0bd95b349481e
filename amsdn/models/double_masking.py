"""Double masking: a prediction that no patch can change wherever the image is certified.

PatchCleanser (Xiang, Mahloujifar & Mittal, USENIX Security 2022), Algorithm 1. With P[i][j] the class under masks i and j:

1. If all one-mask predictions P[i][i] agree, that is the answer.
2. Else, for each mask i in order whose P[i][i] differs from the majority: if P[i][j] = P[i][i] for every j, that is the answer.
3. Else the answer is the majority.

If P[i][j] is y for every pair on the clean image, then y is the answer on every image that differs from it only inside a
patch that some mask covers (their Theorem 1). Proof: let mask g cover the patch, and P' be the table of the patched image.
What is under g does not matter, so P'[g][j] = P[g][j] = y for every j. One-mask predictions that agree can only agree on
P'[g][g] = y. No mask k confirms another class, as P'[k][g] = P'[g][k] = y. And g confirms y where the majority is not y.

Three things that the paper leaves open, and that an attacker must not profit from:

- A view without a finite largest logit has the class ``UNUSABLE``, which has no vote and is never an answer: it only denies
  confirmation. The proof holds as it stands: y is a class, and the views that it speaks of are those of the clean image.
- Ties of the majority go to the smallest class; the proof does not care.
- Which class a view has may hang on rounding where two logits are all but equal: ``certified`` with a ``tolerance``, and
  ``evaluation.patch_certificate``, claim nothing then.

**Challenger masking** (``ChallengerMasking``; their appendix) has the same certificate. All masks with a class are live. Two live
masks i and k of different classes meet: P[i][k] refutes i if it is not i's class, and k if it is not k's. When all live masks
have one class, that is the answer; when none is left, the majority of the first round is.

- At most M - 1 meetings: one class cannot be both i's and k's, so each refutes at least one mask, and needs two live ones.
- With y and g as above, P'[g][j] = y for every j: g votes y, and no meeting refutes it. So g is live at the end, and the
  answer is its class. Nothing was assumed about who meets whom: the order is free, were it the attacker's.
- A mask without a class is never live, a meeting without a class refutes both. Neither concerns g: its views are those of the clean image.

Deviation: several meetings of an image at once, in an order that needs fewer of them. Measured on a ResNet-20 trained with masks
(CIFAR-10, 36 masks, images without unanimity): 13 on average, 19 in the order of the masks; 37 passes for Algorithm 1.

**Coarser masks first** (``coarser``; ours). Larger masks need far fewer pairs, but hide more than many images bear. So a pair
(i, j) may be looked at through larger masks I and J around i and j: where the classifier is confident under I and J (largest
probability at least ``confidence``), that class is P[i][j]; else the next smaller masks are asked, in the end i and j
themselves, confident or not. Above, nothing was used of P but that it is symmetric, and that a mask g over the patch leaves
P[g][j] as it was. Both still hold: every view that P[g][j] comes from hides all that g hides, so it shows nothing of the
patch, and whether it is confident does not depend on the patch either. One view now stands for up to 16 pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.mask_average import MaskAverage, mean_log_probability
from amsdn.models.masking_rounds import majority, meetings
from amsdn.protocols import GREY, device_of, is_stochastic
from amsdn.utils.masking import UNUSABLE, MaskTree, confidence_of, mask_pairs, mask_tree, masked_views, pair_table, view_labels


class Decision(NamedTuple):
    """What the rounds after the first one say."""

    answer: Tensor  # [B] int64
    passes: Tensor  # [B] int64, views spent on it


class MaskingAnalysis(NamedTuple):
    """The answers with certified detection. Satisfies ``amsdn.protocols.Analysis``."""

    logits: Tensor  # [B,K], as ``forward`` gives them
    anomaly_score: Tensor  # [B] in [0,1]
    detected: Tensor  # [B] bool
    anomaly_map: Tensor  # [B,1,H,W] in [0,1]


@dataclass(frozen=True)
class MaskingSettings:
    """All that the answers depend on, besides the classifier and the inference."""

    patch: tuple[int, int]
    masks_per_axis: tuple[int, int]
    fill: tuple[float, ...]
    coarser: tuple[int, ...]
    confidence: float


class DoubleMasking(nn.Module):
    """Any classifier, answering by double masking. images [B,3,H,W] of any size -> logits [B,K] whose argmax is the answer.

    ``patch`` is what one mask must be able to cover: the side of a square, or (height, width). ``masks_per_axis`` is one number
    or (down, across). ``fill`` is the colour of covered pixels, which should be the one that the classifier was trained with.
    ``coarser`` and ``confidence`` are explained above: (2,) asks masks around 2 x 2 others first, (2, 2) around 4 x 4 before that.
    At most ``views_per_pass`` masked views are in memory at once.

    Forward passes of the classifier per image, without coarser masks: M for the first round; M more for each disagreeing mask
    that is looked at, and fewer where one is refuted early. The outcome for one image does not depend on its batch.
    """

    fill: Tensor
    detection_threshold: ClassVar[float] = 0.0  # of ``analyze``: the alarm unless one-mask predictions are unanimous

    def __init__(
        self,
        classifier: nn.Module,
        patch: int | tuple[int, int],
        masks_per_axis: int | tuple[int, int] = 6,
        fill: Sequence[float] | Tensor = GREY,
        views_per_pass: int = 128,
        *,
        coarser: tuple[int, ...] = (),
        confidence: float = 0.8,
    ) -> None:
        super().__init__()
        self.patch = (patch, patch) if isinstance(patch, int) else patch
        self.masks_per_axis = (masks_per_axis, masks_per_axis) if isinstance(masks_per_axis, int) else masks_per_axis
        if min(*self.patch, *self.masks_per_axis, views_per_pass) < 1:
            raise InputError(
                f"DoubleMasking: patch, masks_per_axis and views_per_pass must be at least 1, got {patch}, {masks_per_axis}, {views_per_pass}"
            )
        colour = torch.as_tensor(fill, dtype=torch.float32, device=device_of(classifier)).detach().clone()
        if colour.numel() != 3 or not bool(((colour >= 0) & (colour <= 1)).all()):
            raise InputError(f"DoubleMasking: fill must be a colour, three numbers in [0,1], got {fill}")
        if any(group < 2 for group in coarser) or not 0 <= confidence <= 1:
            raise InputError(
                f"DoubleMasking: coarser must hold numbers from 2, and confidence be a probability, got {coarser} and {confidence}"
            )
        self.classifier, self.views_per_pass = classifier, views_per_pass
        self.coarser, self.confidence = coarser, confidence
        self.register_buffer("fill", colour.reshape(1, 3, 1, 1), persistent=False)
        self.train(classifier.training)

    @property
    def config(self) -> MaskingSettings:
        """What identifies the defence, besides its class and the classifier, in run folders and in the records of its certificates."""
        fill = tuple(round(value, 6) for value in self.fill.flatten().tolist())
        return MaskingSettings(self.patch, self.masks_per_axis, fill, self.coarser, self.confidence)

    @property
    def stochastic(self) -> bool:
        """Whether the classifier is random; the certificate then means nothing."""
        return is_stochastic(self.classifier)

    def masks(self, height: int, width: int, /) -> Tensor:
        """The covering set for images of this size, [M,1,H,W] bool, True where a mask covers. InputError if the patch does not fit."""
        return self.tree(height, width).finest

    def tree(self, height: int, width: int, /) -> MaskTree:
        """The covering set and the coarser masks above it. InputError if the patch does not fit."""
        if self.patch[0] > height or self.patch[1] > width:
            raise InputError(f"DoubleMasking: a {self.patch[0]}x{self.patch[1]} patch does not fit images of {height}x{width}")
        return mask_tree(height, width, self.patch, self.masks_per_axis, self.coarser, self.fill.device)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] -> log-probabilities [B,K] whose argmax is the answer: two parts the answer, one part the mean over one-mask views.

        The second part moves with the image while the answer stands, which is what margins and detection scores need.
        An unusable view counts there as one that finds all classes equal.
        """
        logits = self.first_round(x)
        return self._scores(logits, self.decide(x, logits).answer)

    @staticmethod
    def _scores(logits: Tensor, answer: Tensor) -> Tensor:
        """What ``forward`` returns [B,K], from the first round [B,M,K] and the answers [B]."""
        chosen = F.one_hot(answer, logits.shape[2]) == 1
        mean = mean_log_probability(logits.masked_fill((view_labels(logits) == UNUSABLE).unsqueeze(2), 0.0))
        return torch.where(chosen, torch.logaddexp(mean, mean.new_tensor(math.log(2))), mean) - math.log(3)

    @torch.no_grad()
    def first_round(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] -> logits under each single mask, [B,M,K]."""
        tree = self.tree(*x.shape[2:])
        count = tree.ancestors.shape[1]
        own = torch.arange(count, device=x.device).repeat(len(x))
        rows = torch.arange(len(x), device=x.device).repeat_interleave(count)
        return self.look(x, tree, rows, own, own)[0].reshape(len(x), count, -1)

    @torch.no_grad()
    def decide(self, x: Tensor, logits: Tensor) -> Decision:
        """The answers for x [B,3,H,W] given ``logits`` [B,M,K] of the first round: looks only at the pairs that ``answer`` would need.

        Neither the answer for an image nor its passes depend on the others.
        """
        tree, votes = self.tree(*x.shape[2:]), view_labels(logits)
        result, passes = majority(votes, logits.shape[2]), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        untried = (votes != result.unsqueeze(1)) & (votes != UNUSABLE)
        every = torch.arange(votes.shape[1], device=x.device)
        while len(rows := untried.any(1).nonzero().squeeze(1)):
            mask = untried[rows].int().argmax(1)  # the next disagreer of each image
            vote = votes[rows, mask]
            confirmed, spent = self._all_answer(x[rows], tree, mask.unsqueeze(1).expand(-1, len(every)), every, vote)
            passes[rows] += spent
            result[rows[confirmed]] = vote[confirmed]
            untried[rows, mask] = False
            untried[rows[confirmed]] = False
        return Decision(result, passes)

    @torch.no_grad()
    def certified(self, x: Tensor, y: Tensor, tolerance: float = 0.0) -> Tensor:
        """Whether all two-mask predictions on x [B,3,H,W] are y [B], [B] bool: then no covered patch changes the answer y.

        ``tolerance`` is that of ``view_labels``. ``PatchCertifier`` says the same with fewer passes.
        """
        tree = self.tree(*x.shape[2:])
        first, second = mask_pairs(tree.ancestors.shape[1], x.device)
        return self._all_answer(x, tree, first.expand(len(x), -1), second, y, tolerance)[0] & (y != UNUSABLE)

    @torch.no_grad()
    def analyze(self, x: Tensor) -> "MaskingAnalysis":
        """The answers to x [B,3,H,W] with certified detection: the alarm is raised unless all one-mask predictions agree.

        The score is the share of masks whose prediction is not the majority's, so ``detection_threshold`` is 0; the map is, for each
        pixel, their share among the masks that cover it: the masks that hide a patch are the ones that disagree.
        """
        logits = self.first_round(x)
        votes, masks = view_labels(logits), self.masks(*x.shape[2:]).squeeze(1).to(logits.dtype)
        most = majority(votes, logits.shape[2]).unsqueeze(1)
        odd = ((votes != most) | (votes == UNUSABLE)).to(logits.dtype)
        where = torch.einsum("bm,mhw->bhw", odd, masks) / masks.sum(0).clamp_min(1)
        score = odd.mean(1)
        return MaskingAnalysis(self._scores(logits, self.decide(x, logits).answer), score, score > 0, where.unsqueeze(1))

    @torch.no_grad()
    def unanimous(self, x: Tensor) -> Tensor:
        """Certified detection: the class [B] of all one-mask predictions, or ``UNUSABLE`` where they differ, which is the alarm."""
        votes = view_labels(self.first_round(x))
        return torch.where((votes == votes[:, :1]).all(1), votes[:, 0], UNUSABLE)

    @torch.no_grad()
    def prediction_table(self, x: Tensor) -> Tensor:
        """P of the module's docstring for x [B,3,H,W], [B,M,M] int64."""
        tree = self.tree(*x.shape[2:])
        count = tree.ancestors.shape[1]
        first, second = mask_pairs(count, x.device)
        rows = torch.arange(len(x), device=x.device).repeat_interleave(len(first))
        labels = view_labels(self.look(x, tree, rows, first.repeat(len(x)), second.repeat(len(x)))[0]).reshape(len(x), -1)
        return pair_table(labels, count)

    def differentiable_surrogate(self) -> nn.Module:
        """The mean over one-mask views alone (of the finest masks), through the classifier's own surrogate where it has one."""
        return MaskAverage(self)

    def look(self, x: Tensor, tree: MaskTree, rows: Tensor, first: Tensor, second: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
        """The logits [N,K] that P has for the pairs of masks ``first`` and ``second`` [N] on the images ``rows`` [N], and the passes [B].

        Coarser masks are asked first, each pair of them once for all the pairs that it stands for. With a ``tolerance``, logits
        are NaN where a confidence is so near its threshold that rounding might decide.
        """
        passes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if len(tree.ancestors) == 1:
            return self._logits(x, tree.masks, rows, first, second), passes.index_add_(0, rows, torch.ones_like(rows))
        size, pending, found = len(tree.masks), torch.arange(len(rows), device=x.device), None
        for height, ancestor in enumerate(tree.ancestors, start=1 - len(tree.ancestors)):  # 0 at the finest level
            a, b = ancestor[first[pending]], ancestor[second[pending]]
            key = (rows[pending] * size + torch.minimum(a, b)) * size + torch.maximum(a, b)
            asked, place = key.unique(return_inverse=True)
            row = asked // (size * size)
            logits = self._logits(x, tree.masks, row, asked // size % size, asked % size)
            passes.index_add_(0, row, torch.ones_like(row))
            found = logits.new_empty(len(rows), logits.shape[1]) if found is None else found
            settled = torch.ones(len(asked), dtype=torch.bool, device=x.device)
            if height:
                confidence = confidence_of(logits)
                doubtful = (confidence - self.confidence).abs() < tolerance
                settled = (confidence >= self.confidence) | doubtful
                logits = logits.masked_fill(doubtful.unsqueeze(1), torch.nan)
            found[pending] = logits[place]
            pending = pending[~settled[place]]
            if not len(pending):
                break
        assert found is not None, "a tree has at least one level"
        return found, passes

    def _all_answer(
        self, x: Tensor, tree: MaskTree, first: Tensor, second: Tensor, label: Tensor, tolerance: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Whether every pair ``first[b]``, ``second`` [B,N], [N] is called ``label[b]`` on image b, [B] bool; and the passes, [B].

        An image is looked at in blocks of 1, 2, 4, ... pairs until one holds a refutation, whatever the others do.
        """
        holds = torch.ones(len(x), dtype=torch.bool, device=x.device)
        passes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        start, size = 0, 1
        while start < len(second) and len(rows := holds.nonzero().squeeze(1)):
            block = slice(start, start + size)
            i = first[rows, block]
            j = second[block].expand_as(i)
            at = torch.arange(len(rows), device=x.device).repeat_interleave(i.shape[1])
            logits, spent = self.look(x[rows], tree, at, i.flatten(), j.flatten(), tolerance)
            holds[rows] = (view_labels(logits, tolerance).reshape(len(rows), -1) == label[rows].unsqueeze(1)).all(1)
            passes[rows] += spent
            start, size = start + size, 2 * size
        return holds, passes

    def _logits(self, x: Tensor, masks: Tensor, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Logits [N,K] of view n: image ``rows[n]`` under masks ``first[n]`` and ``second[n]``; ``views_per_pass`` at a time."""
        chunks = zip(*(t.split(self.views_per_pass) for t in (rows, first, second)), strict=True)
        return torch.cat([self.classifier(masked_views(x[r], masks, i, j, self.fill)).float() for r, i, j in chunks])


class ChallengerMasking(DoubleMasking):
    """Any classifier, answering by challenger masking; otherwise as ``DoubleMasking``, with the same certificate.

    In each round every image holds as many meetings as it can between masks that vote for its leading class and masks that do
    not, and all images share the passes. Under two masks, logits change by about the sum of their changes under each one; so the
    masks most likely to refute others are asked first: those that favour the leading class most over its main rival.
    """

    @torch.no_grad()
    def decide(self, x: Tensor, logits: Tensor) -> Decision:
        """The answers for x [B,3,H,W] given ``logits`` [B,M,K] of the first round, after at most M - 1 meetings per image.

        Neither the answer for an image nor its passes depend on the others. With coarser masks a meeting may take a pass per level.
        """
        tree, votes = self.tree(*x.shape[2:]), view_labels(logits)
        live, passes = votes != UNUSABLE, torch.zeros(len(x), dtype=torch.int64, device=x.device)
        while True:
            rows, first, second = meetings(votes, live, logits)
            if not len(rows):
                break
            seen, spent = self.look(x, tree, rows, first, second)
            label = view_labels(seen)
            live[rows, first] = label == votes[rows, first]  # a mask is in one meeting a round
            live[rows, second] = label == votes[rows, second]
            passes += spent
        survivor = votes.gather(1, live.int().argmax(1, keepdim=True)).squeeze(1)
        return Decision(torch.where(live.any(1), survivor, majority(votes, logits.shape[2])), passes)
