"""Many smoothing certificates at once: a fixed batch of noisy copies, always full, of whichever images are still undecided.

The noise of an image comes in *blocks* from a generator of its own, seeded by its id. The first blocks choose the class and are
then thrown away; of the further ones a ``Judge`` says whether their counts suffice. A batch holds one block of each
image under way; when fewer images are left than blocks fit, each gets several, judged one after the other, and what lies
beyond the decision is discarded (counted in ``seconds``, not in ``samples``). So the outcome for an image depends on its own blocks
alone, not on how many were computed beside them, and memory is one batch whatever the number of samples and the size of the images.

How far that goes in floating point. Noise is bitwise the same wherever its block lies, and every forward pass has the same shape, so that the
same kernels run. On the CPU a row of logits then did not depend on its place in the batch in the convolutional networks tried; after
a plain product with a large matrix it did, in its last bit, and a GPU promises no more. So where two logits are equal up to rounding, a
repeated run may count a copy otherwise. No class gains by that: places are given out before the noise is drawn.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amsdn.evaluation.certifier import ABSTAIN, Certifier, Claim, Sample
from amsdn.evaluation.smoothing import answers_of, check_usable
from amsdn.evaluation.smoothing_judges import Counts, Judge, MostProbable, SmoothingConfig, Tally
from amsdn.protocols import check_eval_mode, check_images, device_of, is_stochastic
from amsdn.records import config_hash
from amsdn.utils.helpers import derive_seed, generator


@dataclass
class _Trial:
    """One image under way."""

    sample: Sample
    noise: torch.Generator
    state: Any
    choosing: int  # blocks still to be used for choosing the class
    next_look: int
    votes: Counts | None = None  # by class, of the choosing blocks; after them, of those since
    guess: int = ABSTAIN
    n: int = 0  # samples since
    seconds: float = 0.0
    over: bool = False

    def add(self, block: Counts, size: int) -> None:
        """Take the counts [K] of one more block of that many samples."""
        self.votes = block if self.votes is None else self.votes + block
        if not self.choosing:
            self.n += size
            return
        self.choosing -= 1
        if not self.choosing:
            self.guess, self.votes = int(self.votes.argmax()), None  # samples that chose the class may not count for it

    @property
    def hits(self) -> int:
        return 0 if self.votes is None else int(self.votes[self.guess])


class SmoothingCertifier(Certifier):
    """l2 certificates of the Gaussian-smoothed classifier, by the procedure of ``config.judge()``."""

    kinds: tuple[str, ...] = ("l2",)

    def __init__(self, model: nn.Module, config: SmoothingConfig) -> None:
        """Raises InputError where the model is in train mode."""
        check_eval_mode(model, "randomized smoothing")
        self.model, self.config, self.seed = model, config, config.seed
        self.judge = self._judge()
        self.lanes = config.batch_size // config.block
        self.choosing = -(-config.n0 // config.block)
        # Noise does not depend on the size of the batch, nor on what is asked of the image beyond the kind of claim.
        self.key = config_hash(self.kinds[0], replace(config, batch_size=config.block))

    def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        """One claim per sample, "l2". Images of one size share batches; those of a stochastic model have one to themselves.

        Raises InputError where logits are not finite on a noisy copy, also one beyond a decision.
        """
        for _, alike in groupby(samples, key=lambda sample: sample.image.shape):
            if not is_stochastic(self.model):
                yield from self._together(alike, self.lanes)
                continue
            for sample in alike:  # alone, so that the model's own draws repeat with the sample's
                with _model_noise(device_of(self.model), self.config.seed, self.key, sample.sample_id):
                    found = list(self._together(iter([sample]), 1))
                yield from found

    def _judge(self) -> Judge:
        return self.config.judge()

    @torch.no_grad()
    def _together(self, samples: Iterator[Sample], most: int) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        """Certify all samples, of one size, at most ``most`` at a time."""
        trials: list[_Trial] = []
        while True:
            trials += [self._trial(sample) for sample in islice(samples, most - len(trials))]
            if not trials:
                return
            started = time.perf_counter()
            shares = _shares(self.lanes, len(trials))
            self._count(trials, shares, self._votes(trials, shares))
            seconds = (time.perf_counter() - started) / self.lanes
            for trial, share in zip(trials, shares, strict=True):
                trial.seconds += seconds * share
            yield from ((t.sample.sample_id, {self.kinds[0]: self._claim(t)}) for t in trials if t.over)
            trials = [t for t in trials if not t.over]

    def _trial(self, sample: Sample) -> _Trial:
        noise = generator(device_of(self.model), self.config.seed, self.key, sample.sample_id)
        return _Trial(sample, noise, self.judge.start(), self.choosing, self.judge.next_look(0))

    def _votes(self, trials: Sequence[_Trial], shares: Sequence[int]) -> Counts:
        """How often each class is the answer, by block [lanes, K], in one batch: ``shares[i]`` blocks of trial i, next to one another."""
        image = trials[0].sample.image
        noisy = torch.empty((self.lanes, self.config.block, *image.shape), device=image.device, dtype=torch.float32)
        lanes = iter(noisy)
        for trial, share in zip(trials, shares, strict=True):
            for lane in islice(lanes, share):  # block by block: what a generator gives depends on the size asked for
                torch.randn(lane.shape, generator=trial.noise, out=lane)
                lane.mul_(self.config.sigma).add_(trial.sample.image)  # two roundings; a fused sum could depend on how threads split it
        answers, classes = answers_of(self.model, noisy.flatten(0, 1))
        found = answers.reshape(self.lanes, -1).cpu().numpy()  # the one moment in a batch that waits for the device
        check_usable(bool((found >= 0).all()))
        places = found + classes * np.arange(self.lanes)[:, None]
        return np.bincount(places.ravel(), minlength=self.lanes * classes).reshape(self.lanes, classes)

    def _count(self, trials: Sequence[_Trial], shares: Sequence[int], votes: Counts) -> None:
        """Add the blocks to the trials in order; the judge looks where it wants to."""
        first = np.cumsum([0, *shares[:-1]]).tolist()
        for place in range(max(shares)):
            due = []
            for trial, start, share in zip(trials, first, shares, strict=True):
                if place >= share or trial.over:
                    continue
                trial.add(votes[start + place], self.config.block)
                if not trial.choosing and trial.n >= trial.next_look:
                    due.append(trial)
            if due:
                self._look(due)

    def _look(self, trials: Sequence[_Trial]) -> None:
        """Ask the judge which of these trials are over."""
        decided = self.judge.decided([t.state for t in trials], _tally(trials))
        for trial, over in zip(trials, decided, strict=True):
            trial.over = bool(over)
            trial.next_look = self.judge.next_look(trial.n)

    def _claim(self, trial: _Trial) -> Claim:
        radius = self.judge.radius(trial.state, trial.hits, trial.n)
        samples = self.choosing * self.config.block + trial.n
        return Claim(ABSTAIN, 0.0, samples, trial.seconds) if radius is None else Claim(trial.guess, radius, samples, trial.seconds)


class _SmoothedAnswers(SmoothingCertifier):
    """What is the answer on the image itself? Not for records."""

    kinds = ("prediction",)

    def _judge(self) -> Judge:
        return MostProbable(self.config.test())


def smoothed_predictions(model: nn.Module, x: Tensor, config: SmoothingConfig | None = None) -> Tensor:
    """What the smoothed classifier answers to images x [B,3,H,W]: int64 [B] on the CPU, -1 where it abstains.

    An answer is not the most probable class with probability at most ``config.alpha``; no more samples are spent than that takes.
    Image i draws the noise of sample id i under ``config.seed``. Whoever makes the images must not know that seed: against known
    noise an image can be searched for that misleads it, so take a fresh secret one to answer strangers. Raises
    InputError for a model in train mode, pixels outside [0,1] and logits that are not finite.
    """
    check_images(x, "randomized smoothing")
    certifier = _SmoothedAnswers(model, config or SmoothingConfig())
    device = device_of(model)
    claims = dict(certifier.certify(Sample(i, image.to(device)) for i, image in enumerate(x)))
    return torch.tensor([claims[i]["prediction"].prediction for i in range(len(x))])


def _tally(trials: Sequence[_Trial]) -> Tally:
    votes, rows = np.stack([t.votes for t in trials if t.votes is not None]), np.arange(len(trials))
    guess = np.array([t.guess for t in trials])
    hits = votes[rows, guess]
    votes[rows, guess] = 0
    return Tally(hits, votes.max(axis=1), np.array([t.n for t in trials], dtype=np.int64))


def _shares(lanes: int, trials: int) -> list[int]:
    """How many of the lanes each trial gets: all are used, as evenly as can be."""
    return [lanes // trials + (i < lanes % trials) for i in range(trials)]


@contextmanager
def _model_noise(device: torch.device, *parts: object) -> Iterator[None]:
    """A stochastic model may draw from the global generator: lend it a state of its own, so that a resumed run repeats it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed("model noise", *parts))
        yield
