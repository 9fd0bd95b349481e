"""How much each location of a feature map counts when the map is pooled.

By itself every location counts with its own length: the loudest decide, and a patch makes loud ones. With *bounded evidence* every
location's features have unit length when pooled, so that only attention makes one louder than another: eight times at most, two by
its gate and four by its level's share. Clipping the lengths was proposed against universal patches (Yu et al., ICCV 2021).
"""

import torch
from torch import Tensor

from amsdn.models.layout import space_mean, weighted_space_means

EVIDENCE_EPS = 1e-4  # features of smaller mean square are not raised to unit length


def to_unit_length(f: Tensor) -> Tensor:
    """What brings the features f [B,C,...] to unit RMS over channels: a float32 factor [B,1,...]."""
    return f.float().square().mean(1, keepdim=True).add(EVIDENCE_EPS).rsqrt()


def evidence_weights(f: Tensor, attention: Tensor | None, *, bounded: bool) -> Tensor | None:
    """What each location of f [B,C,h,w] counts, [B,1,h,w], given attention's weights of that shape; None: all alike."""
    if not bounded:
        return attention
    unit = to_unit_length(f)
    return unit if attention is None else attention * unit


def pooled(f: Tensor, attention: Tensor | None, *, bounded: bool) -> Tensor:
    """f [B,C,h,w] -> [B,C], the mean over locations, each counting as it should."""
    weights = evidence_weights(f, attention, bounded=bounded)
    return space_mean(f) if weights is None else torch.squeeze(weighted_space_means(f, weights), 1)
