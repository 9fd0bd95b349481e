"""Prediction consistency: does the answer survive when parts of the image are covered?

The light mode below asks a few fixed views and averages. It raises the cost of an attack and carries no certificate.
The verified mode is double masking over the complete covering set: see ``double_masking``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from amsdn.utils.masking import covering_masks

PATCH_SHARE = 5 / 32  # side of the square that one mask must be able to cover, as a share of the image side
MASKS_PER_AXIS = 6


class Consistency(NamedTuple):
    """logits [B,K]: log of the mean probability over image and views; agreement [B] in [0,1]: mean probability that
    the views give to the class of those logits."""

    logits: Tensor
    agreement: Tensor


def occlusion_masks(samples: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """``samples`` masks, evenly chosen from a covering grid that is fine enough to hold so many, [samples,1,H,W] bool."""
    patch = max(round(PATCH_SHARE * min(height, width)), 1)
    per_axis = max(MASKS_PER_AXIS, int(samples**0.5 + 0.999999))
    grid = covering_masks(height, width, patch, per_axis, device)
    chosen = [int((i + 0.5) * len(grid) / samples) for i in range(samples)]  # repeats only if the image has fewer masks
    return grid[chosen]


def consistent_prediction(logits: Tensor, x: Tensor, classify: Callable[[Tensor], Tensor], samples: int, fill: Tensor) -> Consistency:
    """logits [B,K] of images x [B,3,H,W] in [0,1], joined by those of ``samples`` occluded views of each image.

    Covered pixels take the colour ``fill`` [1,3,1,1]. Views are the same for every image and call, so the outcome for
    one image is deterministic and independent of its batch. Views run one after another: memory stays that of one pass
    when no gradient is asked for.
    """
    probabilities = [logits.float().softmax(1)]
    for mask in occlusion_masks(samples, x.shape[2], x.shape[3], x.device):
        probabilities.append(classify(torch.where(mask, fill, x)).float().softmax(1))
    mean = torch.stack(probabilities).mean(0)
    views = torch.stack(probabilities[1:]).mean(0)
    agreement = views.gather(1, mean.argmax(1, keepdim=True)).squeeze(1)
    return Consistency(mean.clamp_min(torch.finfo(mean.dtype).tiny).log(), agreement)
