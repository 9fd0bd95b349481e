"""The l0 certificate: no change of this many pixels changes the answer of a defence that votes over disjoint pixels.

The bound and its proof stand at ``amsdn.utils.voting.changes_survived``: one pixel, in all its channels, belongs to one part and so
changes one voter (feature partition aggregation with run-off, Hammoudeh & Lowd, AAAI 2024). It is deterministic: no alpha, no sampling. A
perturbation counts by its changed *pixels*, may lie anywhere and have any values; certified is the voting defence, not the
classifier inside it.

What the proof needs of the model, and is checked or covered: eval mode (batch statistics would couple parts and images); no
randomness of its own; logits that depend on their view alone (batches of other sizes round differently, so voters within
the model's ``tolerance`` of undecided, and those not finite, are counted as the adversary's).
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import nn

from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN, Certifier, Claim, Sample
from amsdn.protocols import check_eval_mode, check_images, is_stochastic, pixel_voting_of
from amsdn.utils.voting import changes_survived

WHERE = "l0 certificate"


@dataclass(frozen=True)
class L0Config:
    """The defence that is certified, as it declares itself (see ``PixelVoting``)."""

    rows: int
    columns: int
    tolerance: float


class L0Certifier(Certifier):
    """l0 certificates of a ``PixelVoting`` defence: one pass of its classifier for each part of each image."""

    kinds = ("l0",)

    def __init__(self, defence: nn.Module, images_per_batch: int = 32) -> None:
        """``images_per_batch`` images are held at once; how many views of them, the defence says. It does not influence claims.

        Raises InputError for a model without pixel votes, in train mode or with randomness.
        """
        voting = pixel_voting_of(defence)
        if voting is None:
            raise InputError(f"{WHERE}: the model does not vote over disjoint pixels; wrap it in PixelPartition(model, rows, columns)")
        if images_per_batch < 1:
            raise InputError(f"{WHERE}: images_per_batch must be at least 1, got {images_per_batch}")
        if is_stochastic(defence):
            raise InputError(f"{WHERE}: the classifier is stochastic, but its votes must be deterministic; switch its randomness off")
        check_eval_mode(defence, WHERE)
        self.voting, self.images_per_batch = voting, images_per_batch
        self.model = voting.classifier
        self.config = L0Config(*voting.grid, voting.tolerance)

    @torch.no_grad()
    def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        """The claims of each sample, batch by batch, in their order. Abstains where rounding alone could change the answer.

        Raises InputError for images that are not in [0,1] or smaller than the grid.
        """
        while batch := list(islice(samples, self.images_per_batch)):
            for _, alike in groupby(batch, key=lambda sample: sample.image.shape):
                yield from self._certify_batch(list(alike))

    def _certify_batch(self, batch: list[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        started = time.perf_counter()
        x = torch.stack([sample.image for sample in batch])
        check_images(x, WHERE)
        logits = self.voting.part_logits(x)
        assert logits.shape[:2] == (len(batch), self.voting.parts), f"{len(batch)} images of {self.voting.parts} parts: {logits.shape}"
        found = torch.stack(changes_survived(logits, self.voting.tolerance)).tolist()
        seconds = (time.perf_counter() - started) / len(batch)
        for sample, answer, radius in zip(batch, *found, strict=True):
            sure = radius >= 0
            claim = Claim(answer if sure else ABSTAIN, float(radius if sure else 0), self.voting.parts, seconds)
            yield sample.sample_id, {"l0": claim}
