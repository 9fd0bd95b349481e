"""Randomized smoothing: an l2 certificate for any classifier (Cohen, Rosenfeld & Kolter, ICML 2019).

The smoothed classifier answers with the class that the base classifier gives most often under Gaussian noise. What
is certified is the smoothed classifier, not the base classifier that attacks are run against.

Noise is added to images in [0,1] and the sum is not clipped: the proof needs exact Gaussian noise around the image,
so a base classifier must accept values outside [0,1] here. The proof also needs each noisy copy to be judged on its
own, so the model must be in eval mode (batch statistics would couple the copies) and must not compare images within a batch.
A model with randomness of its own is covered: its draws are then part of the noise, as long as they are fresh for each copy.

Three limits that no test of ours can remove. The proof is about real numbers, whereas an image plus noise is rounded to float32; a
classifier made for it could read the image from the rounding (Voráček & Hein, ICLR 2023), a trained one does not. An image must
not have been chosen with knowledge of the noise that judges it. Logits that tie go to the class of the smallest index, as ``argmax`` says.

This file holds the classifier and Cohen's two procedures with a fixed number of samples, one image at a time: the reference.
``smoothing_certifier`` certifies many images together with as few samples as each needs.
"""

import math
from typing import NamedTuple

import torch
from scipy.special import ndtri
from scipy.stats import binomtest  # type: ignore[attr-defined]
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN
from amsdn.evaluation.statistics import clopper_pearson_lower
from amsdn.protocols import check_eval_mode, check_images, device_of


class Certificate(NamedTuple):
    """No image within ``radius`` (l2, pixel units) changes the smoothed prediction; -1 and radius 0 mean no claim."""

    prediction: int
    radius: float
    samples: int  # forward passes spent


class SmoothedClassifier:
    """The Gaussian-smoothed version of a classifier, judged by sampling. Noise is made on the model's device, batch by batch."""

    def __init__(self, model: nn.Module, sigma: float, batch_size: int = 1000) -> None:
        """Raises InputError where the model is in train mode or sigma is not positive."""
        check_eval_mode(model, "randomized smoothing")
        if not 0 < sigma < math.inf or batch_size < 1:
            raise InputError(f"smoothing: sigma must be positive and finite and batch_size at least 1, got {sigma} and {batch_size}")
        self.model, self.sigma, self.batch_size = model, sigma, batch_size

    def certify(self, x: Tensor, generator: torch.Generator, *, n0: int = 100, n: int = 10_000, alpha: float = 0.001) -> Certificate:
        """Certify one image x [3,H,W] (Cohen 2019, Algorithm 1, CERTIFY).

        With probability at least 1 - alpha over the noise the returned radius is true. Abstains when the lower bound
        does not exceed 1/2. ``n0`` samples choose the class and take no part in the bound, without which it would be invalid.
        """
        guess = int(self.counts(x, n0, generator).argmax())
        hits = int(self.counts(x, n, generator)[guess])
        radius = fixed_radius(hits, n, alpha, self.sigma)
        return Certificate(ABSTAIN, 0.0, n0 + n) if radius is None else Certificate(guess, radius, n0 + n)

    def predict(self, x: Tensor, generator: torch.Generator, *, n: int = 1000, alpha: float = 0.001) -> int:
        """The smoothed prediction for one image x [3,H,W], or -1 (Cohen 2019, Algorithm 1, PREDICT).

        With probability at most alpha does this return a class that is not the most probable one (Proposition 1 there;
        the two-sided test between the two most frequent classes is Hung and Fithian's, 2019).
        """
        counts = self.counts(x, n, generator)
        if len(counts) < 2:
            return 0
        (first, second), classes = counts.topk(2)
        sure = binomtest(int(first), int(first + second), 0.5).pvalue <= alpha
        return int(classes[0]) if sure else ABSTAIN

    @torch.no_grad()
    def counts(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """How often each class is the answer among n noisy copies of x [3,H,W] -> [K] int64 on the CPU.

        Raises InputError for n below 1, pixels outside [0,1] and logits that are not finite.
        """
        check_images(x[None], "randomized smoothing")
        if n < 1:
            raise InputError(f"smoothing: the number of samples must be at least 1, got {n}")
        x = x.to(device_of(self.model)).float()
        total: Tensor | None = None
        for start in range(0, n, self.batch_size):
            size = min(self.batch_size, n - start)
            noise = torch.randn((size, *x.shape), generator=generator, device=x.device, dtype=x.dtype)
            answers, classes = answers_of(self.model, noise.mul_(self.sigma).add_(x))  # in place: one batch is all the memory this takes
            total = torch.zeros(1 + classes, dtype=torch.int64, device=x.device) if total is None else total
            total.scatter_add_(0, answers + 1, torch.ones_like(answers))  # unlike bincount, nothing here waits for a GPU
        assert total is not None
        unusable, *counts = total.tolist()
        check_usable(not unusable)
        return torch.tensor(counts)


def answers_of(model: nn.Module, noisy: Tensor) -> tuple[Tensor, int]:
    """The classes int64 [B] of noisy images [B,3,H,W], -1 where logits are not finite, and the number of classes.

    Whoever reads the answers must pass on to ``check_usable`` whether any is -1; asking here would wait for a GPU.
    Raises InputError for logits of a shape other than [B,K].
    """
    logits = model(noisy)
    if logits.ndim != 2 or len(logits) != len(noisy):
        raise InputError(f"the model must give logits [B,K], got {list(logits.shape)} for {len(noisy)} images")
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1), int(logits.shape[1])


def check_usable(usable: bool) -> None:
    """Raise InputError unless all noisy images got finite logits."""
    if not usable:
        raise InputError("the model's logits are not finite on noisy images; it must accept values somewhat outside [0,1]")


def fixed_radius(hits: int, n: int, alpha: float, sigma: float) -> float | None:
    """sigma * Phi^-1 of the exact one-sided lower bound of the class's probability (Cohen 2019, eq. 3 with p_B = 1 - p_A);
    None where the bound does not exceed 1/2. Wrong with probability at most alpha."""
    p_lower = clopper_pearson_lower(hits, n, alpha)
    return None if p_lower <= 0.5 else sigma * float(ndtri(p_lower))
