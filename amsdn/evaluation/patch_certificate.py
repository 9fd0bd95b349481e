"""Certificates against one patch anywhere, for a defence by double masking, at a fraction of the passes of its plain form.

Two statements about every image, with P[i][j] the class under masks i and j (PatchCleanser, Xiang, Mahloujifar & Mittal, USENIX
Security 2022) and a mask set in which every place of the patch lies inside some mask:

- ``patch``: if P[i][j] = y for all pairs, the defence answers y on every image that differs from this one only inside one
  patch (their Theorem 1; for challenger masking and coarser masks see ``models.challenger_masking``, ``models.double_masking``).
- ``patch-detection``: let the defence accept an image where all P[i][i] agree, and raise the alarm elsewhere. If they agree on y
  here, then on an image that differs from this one only inside one patch it answers y or raises the alarm: the mask g over the
  patch leaves P[g][g] = y, so that only y can be unanimous. This is certified *detection* (the idea of Minority Reports, McCoyd et
  al. 2020, whose masks left out the borders; ours reach into the corners). An attacker can always force the alarm.

What saves passes, without a change to what is proved: one-mask predictions first and nothing more for images where they
disagree; each unordered pair once; the pairs that most likely fail first, and none after a failure; coarser masks
first where the defence has them; views of several images in one batch.

Nothing is claimed where rounding might decide: every view must lead by ``tolerance`` (see ``view_labels``), as the same view may
round otherwise in another batch. Keep TF32 and reduced precision off, or raise it.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN, Certifier, Claim, Sample
from amsdn.evaluation.patch_script import Pair, Script, Verdict, Views, examine, judge
from amsdn.protocols import MaskedVoting, check_eval_mode, is_stochastic
from amsdn.utils.masking import MaskTree, covered_places, masked_views

PATCH, DETECTION = "patch", "patch-detection"
WAITING = 32  # images without unanimity that are answered together


class Outcome(Protocol):
    """The answers [B] of a defence and the passes [B] that it spent on them."""

    @property
    def answer(self) -> Tensor: ...

    @property
    def passes(self) -> Tensor: ...


@runtime_checkable
class MaskedInference(MaskedVoting, Protocol):
    """A defence by double masking that can go on from one-mask predictions that are known already."""

    patch: tuple[int, int]  # the largest (height, width) that it is to withstand, in pixels
    confidence: float  # the largest probability from which a view under coarser masks stands for those below it

    @property
    def config(self) -> Any:
        """A frozen dataclass that determines its masks for every image size, its fill and its confidence."""

    def tree(self, height: int, width: int, /) -> MaskTree:
        """Its masks for images of this size."""

    def decide(self, x: Tensor, logits: Tensor, /) -> Outcome:
        """Its answers for x [B,3,H,W], given the logits [B,M,K] under single masks; what it does not depend on the other images."""


@dataclass(frozen=True)
class PatchCertificateConfig:
    """With the classifier and the images, all that a patch certificate depends on."""

    patch: tuple[int, int]  # (height, width) in pixels
    inference: str  # class of the defence
    settings: Any  # of the defence
    tolerance: float


class PatchCertifier(Certifier):
    """Certifies the answers of ``defence``, double or challenger masking, against one patch of at most ``patch`` anywhere.

    ``patch`` is the side of a square or (height, width), by default what the defence was built for; the radius of a claim is a
    side of squares, so min(height, width) for a rectangle. The prediction of a ``patch`` claim is the defence's answer, certified
    or not; that of a ``patch-detection`` claim is the unanimous class, or ``ABSTAIN`` for the alarm. The ``samples`` of the second
    are part of those of the first.

    At most ``views_per_pass`` views, and about as many images, are in memory at once. Raises InputError for a stochastic
    classifier or one in train mode; in ``certify``, for images of different sizes, a patch that does not fit them, and masks that do
    not cover it everywhere.
    """

    kinds = (PATCH, DETECTION)

    def __init__(
        self,
        defence: nn.Module,
        patch: int | tuple[int, int] | None = None,
        *,
        views_per_pass: int = 256,
        tolerance: float = 1e-4,
    ) -> None:
        if not isinstance(defence, MaskedInference):
            raise InputError(
                f"patch certificate: {type(defence).__name__} is no defence by masks; wrap the classifier in ChallengerMasking"
            )
        if is_stochastic(defence) or is_stochastic(defence.classifier):
            raise InputError("patch certificate: the classifier is stochastic; what holds for one draw need not hold for the next")
        check_eval_mode(defence, "patch certificate")
        if views_per_pass < 1 or not 0 <= tolerance < 1:
            raise InputError(
                f"patch certificate: views_per_pass must be at least 1 and tolerance in [0,1), got {views_per_pass}, {tolerance}"
            )
        size = defence.patch if patch is None else (patch, patch) if isinstance(patch, int) else patch
        self.defence: MaskedInference = defence
        self.model = defence.classifier
        self.views_per_pass = views_per_pass
        self.config = PatchCertificateConfig(size, type(defence).__name__, defence.config, tolerance)

    def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        """See ``Certifier``. Passes are full while samples last; what is asked of one image does not depend on the others."""
        queue: deque[_Job] = deque()
        undecided: list[_Job] = []
        tree: MaskTree | None = None
        queued = 0
        while True:
            while queued < self.views_per_pass and (sample := next(samples, None)) is not None:
                tree = tree or self._tree(sample)
                queue.append(self._job(sample, tree))
                queued += len(queue[-1].block)
            if not queue or not tree:
                break
            for job in self._ask(queue, tree):
                if not job.verdict.unanimous:
                    undecided.append(job)
                else:
                    yield job.sample_id, self._claims(job, job.verdict.label)
            queued = sum(len(job.block) - job.asked for job in queue)
            if len(undecided) >= WAITING:
                yield from self._decide(undecided)
                undecided = []
        if undecided:
            yield from self._decide(undecided)

    def _tree(self, sample: Sample) -> MaskTree:
        """The masks for images like the first one, checked."""
        height, width = sample.image.shape[-2:]
        patch = self.config.patch
        if min(patch) < 1 or patch[0] > height or patch[1] > width:
            raise InputError(f"patch certificate: a {patch[0]}x{patch[1]} patch does not fit images of {height}x{width}")
        tree = self.defence.tree(height, width)
        _check_masks(tree, patch)
        return tree

    def _job(self, sample: Sample, tree: MaskTree) -> "_Job":
        expected = [3, *tree.masks.shape[2:]]
        if list(sample.image.shape) != expected:
            raise InputError(
                f"patch certificate: sample {sample.sample_id} has shape {list(sample.image.shape)}, others {expected}; "
                "certify images of one size at a time"
            )
        script = examine(tree)
        return _Job(sample.sample_id, sample.image, script, next(script))

    @torch.no_grad()
    def _ask(self, queue: "deque[_Job]", tree: MaskTree) -> list["_Job"]:
        """One pass over the views that have waited longest. Jobs with more questions are back in the queue, the others are returned."""
        started = time.perf_counter()
        parts = self._next_pass(queue)
        device = self.defence.fill.device
        x = torch.stack([job.image for job, _ in parts]).to(device).float()
        rows = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(pairs) for _, pairs in parts])).to(device)
        nodes = torch.tensor([pair for _, pairs in parts for pair in pairs])
        finest = nodes[:, 0] >= len(tree.masks) - len(tree.finest)
        first, second = nodes.T.to(device)
        logits = self.model(masked_views(x[rows], tree.masks, first, second, self.defence.fill)).float().cpu()
        views = judge(logits, finest, self.defence.confidence, self.config.tolerance)
        through, start = [], 0
        for job, pairs in parts:
            job.receive(views.part(start, start + len(pairs)))
            start += len(pairs)
            if job.through:
                through.append(job)
            elif job.asked == 0:
                queue.append(job)
        seconds = (time.perf_counter() - started) / len(logits)
        for job, pairs in parts:
            job.seconds += seconds * len(pairs)
        return through

    def _next_pass(self, queue: "deque[_Job]") -> list[tuple["_Job", list[Pair]]]:
        """The next ``views_per_pass`` views; a block that does not fit stays at the head of the queue with the rest of it."""
        parts: list[tuple[_Job, list[Pair]]] = []
        room = self.views_per_pass
        while queue and room:
            job = queue[0]
            pairs = job.block[job.asked : job.asked + room]
            job.asked += len(pairs)
            room -= len(pairs)
            parts.append((job, pairs))
            if job.asked == len(job.block):
                queue.popleft()
        return parts

    def _decide(self, jobs: list["_Job"]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        """The defence's answers where one-mask predictions disagree."""
        started = time.perf_counter()
        device = self.defence.fill.device
        x = torch.stack([job.image for job in jobs]).to(device).float()
        with torch.no_grad():
            found = self.defence.decide(x, torch.stack([job.verdict.votes for job in jobs]).to(device))
        answers, passes = found.answer.tolist(), found.passes.tolist()
        seconds = (time.perf_counter() - started) / len(jobs)
        for job, answer, spent in zip(jobs, answers, passes, strict=True):
            job.passes += spent
            job.seconds += seconds
            yield job.sample_id, self._claims(job, answer)

    def _claims(self, job: "_Job", answer: int) -> dict[str, Claim]:
        verdict, radius = job.verdict, float(min(self.config.patch))
        first_round = job.seconds * verdict.first_round / job.passes
        return {
            PATCH: Claim(answer, radius if verdict.certified else 0.0, job.passes, job.seconds),
            DETECTION: Claim(
                verdict.label if verdict.unanimous else ABSTAIN,
                radius if verdict.detection_certified else 0.0,
                verdict.first_round,
                first_round,
            ),
        }


@dataclass
class _Job:
    """One image, the questions that its script asks next (pairs of nodes), and the answers so far."""

    sample_id: int
    image: Tensor
    script: Script
    block: list[Pair]
    asked: int = 0  # of the block
    received: Views | None = None
    passes: int = 0
    seconds: float = 0.0
    outcome: Verdict | None = None

    @property
    def through(self) -> bool:
        return self.outcome is not None

    @property
    def verdict(self) -> Verdict:
        assert self.outcome is not None, f"sample {self.sample_id} has questions left"
        return self.outcome

    def receive(self, views: Views) -> None:
        """Take the next answers of the block; with the last of them the script goes on to the next block or ends."""
        self.passes += len(views.label)
        answers = self.received.followed_by(views) if self.received else views
        if len(answers.label) < len(self.block):
            self.received = answers
            return
        self.received, self.asked = None, 0
        try:
            self.block = self.script.send(answers)
        except StopIteration as end:
            self.outcome = end.value


def _check_masks(tree: MaskTree, patch: tuple[int, int]) -> None:
    """Raise InputError unless every place of the patch is covered, and each mask by those above it: the proof rests on both."""
    uncovered = ~covered_places(tree.finest, patch).any(0)
    if bool(uncovered.any()):
        row, column = uncovered.nonzero()[0].tolist()
        raise InputError(
            f"patch certificate: no mask covers a {patch[0]}x{patch[1]} patch at row {row}, column {column}; build the defence for this patch"
        )
    for chain in tree.ancestors.T.tolist():
        if any(lower not in tree.children[upper] or (tree.masks[lower] & ~tree.masks[upper]).any() for upper, lower in pairwise(chain)):
            raise InputError("patch certificate: a mask is not covered by the coarser one that is asked in its place; use mask_tree()")
