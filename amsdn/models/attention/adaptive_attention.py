"""Adaptive attention on a feature pyramid: where to look, what to look for, and at which scale.

Spatial and channel gates follow the forms of CBAM (Woo et al. 2018) and squeeze-excite (Hu et al. 2018), but gates
run over (0, 2) and everything starts as the identity, so that attention cannot hurt at the start of training.
``python -m amsdn.models.attention.adaptive_attention`` prints shapes and parameter counts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.models.layout import channel_max, channel_mean, space_mean


class SpatialAttention(nn.Module):
    """Where: f [B,C,H,W] -> gate [B,1,H,W] in (0,2), from the mean and maximum over channels; 1 at the start."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.score = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)
        _zero(self.score)

    def forward(self, f: Tensor) -> Tensor:
        pooled = torch.cat([channel_mean(f), channel_max(f)], dim=1)
        return 2 * torch.sigmoid(self.score(pooled))


class ChannelAttention(nn.Module):
    """What: f [B,C,H,W] -> gate [B,C,1,1] in (0,2), from the mean over locations; 1 at the start."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // reduction, 8))
        self.excite = nn.Linear(self.squeeze.out_features, channels)
        _zero(self.excite)

    def forward(self, f: Tensor) -> Tensor:
        gate = self.excite(F.gelu(self.squeeze(space_mean(f))))
        return 2 * torch.sigmoid(gate)[:, :, None, None]


class PyramidAttention(nn.Module):
    """At which scale: every level receives, per location, a softmax-weighted mixture of all levels.

    Levels [B,C,Hl,Wl] -> (levels of the same shapes, weights: per level [B,L,Hl,Wl], summing to 1 over L).
    On its own grid, one 1x1 convolution gives each source level a score for every target and C // reduction values; these
    are what travels between grids, so the finest grid only sees thin tensors. The mixture is added through a projection
    that starts at zero.
    """

    def __init__(self, channels: int, levels: int = 4, reduction: int = 8) -> None:
        super().__init__()
        self.thin = max(channels // reduction, 8)
        self.sources = nn.ModuleList(nn.Conv2d(channels, self.thin + levels, 1) for _ in range(levels))
        self.outs = nn.ModuleList(nn.Conv2d(self.thin, channels, 1) for _ in range(levels))
        for out in self.outs:
            _zero(out)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # split, not slices: its gradient is one concatenation instead of a sum of padded tensors
        carried = [source(f).split([self.thin, len(levels)], dim=1) for source, f in zip(self.sources, levels, strict=True)]
        values, scores = [value for value, _ in carried], [score.split(1, dim=1) for _, score in carried]
        mixed, weights = [], []
        for target, (f, out) in enumerate(zip(levels, self.outs, strict=True)):
            size = (f.shape[-2], f.shape[-1])
            weight = torch.cat([resize(score[target], size) for score in scores], dim=1).float().softmax(1)
            shares = weight.to(values[0].dtype).split(1, dim=1)
            mixture = resize(values[0], size) * shares[0]
            for value, share in zip(values[1:], shares[1:], strict=True):
                mixture = torch.addcmul(mixture, resize(value, size), share)
            mixed.append(f + out(mixture))
            weights.append(weight)
        return mixed, weights


class AttentionOutput(NamedTuple):
    """levels: as the input; spatial: per level [B,1,H,W] in (0,2); pyramid: per level [B,L,H,W], summing to 1 over L."""

    levels: list[Tensor]
    spatial: list[Tensor]
    pyramid: list[Tensor]


class AdaptiveAttention(nn.Module):
    """Spatial and channel gates on each of the levels [B,C,Hl,Wl], then pyramid attention across them. Identity at the start."""

    def __init__(self, channels: int, levels: int = 4) -> None:
        super().__init__()
        self.where = nn.ModuleList(SpatialAttention() for _ in range(levels))
        self.what = nn.ModuleList(ChannelAttention(channels) for _ in range(levels))
        self.scale = PyramidAttention(channels, levels)

    def forward(self, levels: list[Tensor]) -> AttentionOutput:
        spatial = [where(f) for where, f in zip(self.where, levels, strict=True)]
        gated = [f * s * what(f) for what, f, s in zip(self.what, levels, spatial, strict=True)]
        mixed, pyramid = self.scale(gated)
        return AttentionOutput(mixed, spatial, pyramid)


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
    print_stage(module, {"levels in": levels, "levels out": out.levels, "spatial gates": out.spatial, "pyramid weights": out.pyramid})


if __name__ == "__main__":
    main()
