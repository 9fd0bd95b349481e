"""A small residual network for CPU budgets, under the four-level interface.

Dense 3x3 convolutions on few pixels are what a CPU does best: only the stem, of width w, works at full resolution.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.models.backbone.interface import Backbone


def conv_norm(c_in: int, c_out: int, *, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution and its batch norm.

    Batch norm, because a CPU's budget is a dozen epochs and the short schedules measured for this network relied on it.
    Its price: clean and attacked images of one training batch share statistics. Attacks are crafted in eval mode, so
    none can steer them.
    """
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))


class ResidualPair(nn.Module):
    """[B,C,H,W] -> [B,C,H,W]: x plus two convolutions, each with norm and GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_norm(channels, channels)
        self.second = conv_norm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.second(F.gelu(self.first(x))))


class Level(nn.Module):
    """[B,Cin,H,W] -> [B,Cout,H/2,W/2]: a strided convolution, norm, GELU, then a residual pair."""

    def __init__(self, c_in: int, c_out: int, *, residual: bool = True) -> None:
        super().__init__()
        self.reduce = conv_norm(c_in, c_out, stride=2)
        self.pair = ResidualPair(c_out) if residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pair(F.gelu(self.reduce(x)))
        return out


class CompactBackbone(Backbone):
    """Widths (2w, 4w, 8w, 8w) at strides (2, 4, 8, 16) behind a full-resolution stem of width w.

    C5 is one strided convolution without a pair: at 32 px it is 2x2 cells and only supplies global context.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.channels = [2 * width, 4 * width, 8 * width, 8 * width]
        self.strides = [2, 4, 8, 16]
        self.stem = conv_norm(3, width)
        widths = [width, *self.channels]
        self.levels = nn.ModuleList(Level(a, b, residual=i < 3) for i, (a, b) in enumerate(pairwise(widths)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.gelu(self.stem(x))
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps
