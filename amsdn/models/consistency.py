"""Prediction consistency: does the answer survive when parts of the image are covered?

The light mode below covers the image with few large masks, one of which hides any small patch whole. The least probability that a
view gives to the answer is the evidence for it: a patch that changes the answer has no say in the view that hides it. That makes
the alarm provable, for one pass a mask. If under every mask every class but y has a probability of at most t, then no patch can
lead to an answer other than y whose agreement exceeds t: whichever patch it is, the view that hides it gives the wrong answer at
most t. With a threshold calibrated on clean images the price is a stated rate of false alarms, where certified detection by
unanimous views (Minority Reports, McCoyd et al. 2020) alarms on every clean image whose views differ at all.

The verified mode, which answers rather than alarms, is double masking: see ``double_masking``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.utils.masking import covering_masks

PATCH_SHARE = 5 / 32  # side of the square that one mask must be able to cover, as a share of the image side


class Consistency(NamedTuple):
    """logits [B,K]: log of the mean probability over image and views; agreement [B] in [0,1]: the least probability that a
    view gives to the class of those logits."""

    logits: Tensor
    agreement: Tensor


def occlusion_masks(samples: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The smallest rows x columns of masks, at least ``samples`` and 2 x 2, of which one covers any patch, [M,1,H,W] bool.

    A patch is a square of 5/32 of the shorter side, rounded. 5 samples are 2 x 3 masks, 9 are 3 x 3.
    """
    patch = max(round(PATCH_SHARE * min(height, width)), 1)
    rows = max(math.isqrt(samples), 2)
    return covering_masks(height, width, patch, (rows, max(-(-samples // rows), 2)), device)


@dataclass(frozen=True)
class Occlusion:
    """What the light mode sees of an image; ``amsdn.protocols.OccludedViews``."""

    classifier: nn.Module  # images -> logits, of one view
    fill: Tensor  # [1,3,1,1]
    samples: int

    def masks(self, height: int, width: int) -> Tensor:
        """[M,1,H,W] bool."""
        return occlusion_masks(self.samples, height, width, self.fill.device)


def consistent_prediction(
    logits: Tensor, x: Tensor, classify: Callable[[Tensor], Tensor], samples: int, fill: Tensor, *, straight_through: bool = False
) -> Consistency:
    """logits [B,K] of images x [B,3,H,W] in [0,1], joined by those of at least ``samples`` occluded views of each image.

    Covered pixels take the colour ``fill`` [1,3,1,1]. Views are the same for every image and call, so the outcome for
    one image is deterministic and independent of its batch. Views run one after another: memory stays that of one pass
    when no gradient is asked for.

    A least value has a gradient through one view alone, which is none of the attacker's if that view hides the patch. With
    ``straight_through`` the values are the same, and agreement has the slope of the views' mean log-probability.
    """
    probabilities = [logits.float().softmax(1)]
    for mask in occlusion_masks(samples, x.shape[2], x.shape[3], x.device):
        probabilities.append(classify(torch.where(mask, fill, x)).float().softmax(1))
    mean = torch.stack(probabilities).mean(0)
    answers = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    answer = answers.argmax(1, keepdim=True)  # as a reader will find it: two means may share one logarithm, and a tie must not hide a class
    given = torch.stack([p.gather(1, answer).squeeze(1) for p in probabilities[1:]])
    agreement = given.amin(0)
    if straight_through:
        slope = given.clamp_min(torch.finfo(given.dtype).tiny).log().mean(0)
        agreement = agreement.detach() + agreement.detach() * (slope - slope.detach())  # the bracket is exactly zero
    return Consistency(answers, agreement)


def joint_anomaly_logit(anomaly_logit: Tensor | None, agreement: Tensor) -> Tensor:
    """The log-odds [B] of 1 - (1 - a) x agreement, where a is the sigmoid of ``anomaly_logit`` [B] (None: a = 0).

    Where views all but rule the answer out, that score rounds to 1 and has no slope left; its log-odds keep theirs.
    """
    silent = agreement.clamp_min(torch.finfo(agreement.dtype).tiny).log()
    if anomaly_logit is not None:
        silent = silent + F.logsigmoid(-anomaly_logit)
    eps = torch.finfo(silent.dtype).eps
    return (-torch.expm1(silent.clamp_max(-eps))).log() - silent
