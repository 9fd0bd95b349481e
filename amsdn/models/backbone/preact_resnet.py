"""A pre-activation ResNet-18 with SiLU: the control that published robustness numbers at 32 px are compared with.

He et al. 2016, "Identity mappings in deep residual networks"; smooth activations after Gowal et al. 2020.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.models.backbone.interface import Backbone


class PreActBlock(nn.Module):
    """[B,Cin,H,W] -> [B,Cout,H/stride,W/stride]: norm and SiLU come before each of the two convolutions."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride > 1 or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.silu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(F.silu(self.norm2(self.conv1(active))))
        return out + skip


class PreActBackbone(Backbone):
    """Four stages of two blocks, widths (64, 128, 256, 512) at strides (1, 2, 4, 8).

    Each level's output passes a norm and SiLU of its own, because a pre-activation stage ends in a raw sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.channels = [64, 128, 256, 512]
        self.strides = [1, 2, 4, 8]
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        widths = [64, *self.channels]
        self.stages = nn.ModuleList(
            nn.Sequential(PreActBlock(a, b, 1 if i == 0 else 2), PreActBlock(b, b, 1)) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            maps.append(F.silu(norm(x)))
        return maps
