"""Adaptive attention on a feature pyramid: where to look, at which scale, and what to look for.

Attention here decides what is *pooled*, not what the feature maps hold. Its weights over locations come from one 1x1 convolution a
level; features are read once, in the weighted mean. The gate over channels works on the pooled vector. The first form of this module
multiplied and mixed the maps themselves (spatial and channel gates after CBAM, Woo et al. 2018, and squeeze-excite, Hu et al. 2018, then
a mixture of all levels at every location); on a small network it cost half as much as the backbone and brought nothing
(docs/training/ablations.md). Everything starts as the identity, so that attention cannot hurt at the start of training.

``python -m amsdn.models.attention.adaptive_attention`` prints shapes and parameter counts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpatialAttention(nn.Module):
    """Where: scores [B,1,H,W] -> gate [B,1,H,W] in (0,2); 1 where the score is 0."""

    def forward(self, scores: Tensor) -> Tensor:
        return 2 * torch.sigmoid(scores)


class PyramidAttention(nn.Module):
    """At which scale: scores of L levels [B,1,Hl,Wl] -> shares [B,L,h,w] of the levels at every location, summing to 1 over L.

    They are compared on the grid of the second level (the finest where there is one): finer ones would cost more and say little more.
    """

    def forward(self, scores: list[Tensor]) -> Tensor:
        grid = scores[min(1, len(scores) - 1)]
        size = (grid.shape[-2], grid.shape[-1])
        return torch.cat([resize(score, size) for score in scores], dim=1).softmax(1)


class ChannelAttention(nn.Module):
    """What: pooled features [B,E] -> the same, each times a gate in (0,2); 1 at the start."""

    def __init__(self, features: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Linear(features, max(features // reduction, 8))
        self.excite = nn.Linear(self.squeeze.out_features, features)
        _zero(self.excite)

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled * (2 * torch.sigmoid(self.excite(F.gelu(self.squeeze(pooled)))))


class AttentionMaps(NamedTuple):
    """weights: per level [B,1,H,W] in (0,2L), spatial x pyramid, 1 at the start; spatial: per level [B,1,H,W] in (0,2);
    pyramid: [B,L,h,w], summing to 1 over L."""

    weights: list[Tensor]
    spatial: list[Tensor]
    pyramid: Tensor


class AdaptiveAttention(nn.Module):
    """Levels [B,C,Hl,Wl] -> what each location of each level counts in pooling; ``select`` then gates what was pooled, [B,L*C]."""

    def __init__(self, channels: int, levels: int = 4) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Conv2d(channels, 2, 1) for _ in range(levels))
        for score in self.scores:
            _zero(score)
        self.where, self.scale = SpatialAttention(), PyramidAttention()
        self.select = ChannelAttention(levels * channels)

    def forward(self, levels: list[Tensor]) -> AttentionMaps:
        scores = [score(f).float().split(1, dim=1) for score, f in zip(self.scores, levels, strict=True)]
        spatial = [self.where(where) for where, _ in scores]
        pyramid = self.scale([scale for _, scale in scores])
        shares = pyramid.split(1, dim=1)
        weights = [
            gate * len(levels) * resize(share, (gate.shape[-2], gate.shape[-1])) for gate, share in zip(spatial, shares, strict=True)
        ]
        return AttentionMaps(weights, spatial, pyramid)


def resize(f: Tensor, size: tuple[int, int]) -> Tensor:
    """f [B,C,h,w] -> [B,C,*size]: means when shrinking, nearest neighbours when growing."""
    if f.shape[-2:] == size:
        return f
    if f.shape[-2] >= size[0]:
        return F.adaptive_avg_pool2d(f, size)
    return F.interpolate(f, size=size, mode="nearest")


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def main() -> None:
    """Print the shapes and sizes of attention on a 256-channel pyramid of a 224 px image."""
    from amsdn.models.summary import print_stage

    module = AdaptiveAttention(256)
    levels = [torch.rand(1, 256, s, s) for s in (56, 28, 14, 7)]
    out = module(levels)
    print_stage(module, {"levels in": levels, "weights": out.weights, "spatial gates": out.spatial, "pyramid shares": [out.pyramid]})


if __name__ == "__main__":
    main()
