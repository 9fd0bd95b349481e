"""Selective purification: find anomalous locations, rebuild them from their surroundings, leave the rest alone.

``python -m amsdn.models.purification.selective_purifier`` prints shapes and parameter counts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.errors import InputError

PRIOR = 0.02  # anomaly that an untrained head reports everywhere
PRIOR_LOGIT = math.log(PRIOR / (1 - PRIOR))
TEMPERATURE = 0.1  # width of the soft gate, in units of anomaly
MIN_MASS = 1e-4  # share of un-anomalous surroundings below which there is nothing to rebuild from


class AnomalyHead(nn.Module):
    """f [B,C,h,w] -> anomaly logits [B,1,h,w]; about ``PRIOR`` everywhere at the start."""

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.score = nn.Conv2d(hidden, 1, 3, padding=1)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, f: Tensor) -> Tensor:
        out: Tensor = self.score(F.gelu(self.reduce(f)))
        return out


class Denoiser(nn.Module):
    """f [B,C,h,w], anomaly [B,1,h,w] in [0,1] -> rebuilt [B,C,h,w].

    A normalised convolution (Knutsson and Westin 1993; "partial convolution", Liu et al. 2018): every location counts
    with weight 1 - anomaly, and the sum is divided by the weight present, so a location with anomaly 1 has exactly no
    influence, on itself or others. It runs on a grid of half the size, where a 3x3 window reaches over 6x6 locations,
    and starts as the weighted mean of that window. Where all of the window is anomalous, nothing is known: zero
    plus the bias of ``mix`` stands in, and the location drops out of the pooled evidence.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gather = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.mix = nn.Conv2d(channels, channels, 1)
        nn.init.constant_(self.gather.weight, 1 / 9)
        nn.init.dirac_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, f: Tensor, anomaly: Tensor) -> Tensor:
        size = (f.shape[-2], f.shape[-1])
        half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        keep = 1 - anomaly
        # The mass is a single channel: full precision is free, and a rounded one would bias the mean.
        mass = F.avg_pool2d(F.adaptive_avg_pool2d(keep, half), 3, stride=1, padding=1)
        gathered = self.gather(F.adaptive_avg_pool2d(f * keep.to(f.dtype), half))
        rebuilt = self.mix(gathered * (1 / mass.clamp_min(MIN_MASS)).to(f.dtype))
        return F.interpolate(rebuilt, size=size, mode="nearest")


class PurifierOutput(NamedTuple):
    """Per level: purified features [B,C,h,w], anomaly logits [B,1,h,w] and the gates [B,1,h,w] in {0,1} that were applied."""

    levels: list[Tensor]
    anomaly_logits: list[Tensor]
    gates: list[Tensor]


class SelectivePurifier(nn.Module):
    """On each of the levels [B,C,h,w]: anomaly, rebuilding, and a fusion that replaces only what is anomalous.

    A location is rebuilt where its anomaly exceeds ``threshold``, and is passed on untouched elsewhere. With
    ``straight_through`` the gate's value is the same hard one, but its gradient is that of
    sigmoid((anomaly - threshold) / TEMPERATURE): for training, and as the surrogate that adaptive attacks go through.
    Without it the gate is a constant to autograd. Raises InputError unless ``threshold`` lies in (0,1).
    """

    def __init__(self, channels: int, threshold: float = 0.5, levels: int = 4) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise InputError(f"purification_threshold must lie in (0, 1), got {threshold}; 0.5 is the default")
        self.threshold = threshold
        self.heads = nn.ModuleList(AnomalyHead(channels) for _ in range(levels))
        self.denoisers = nn.ModuleList(Denoiser(channels) for _ in range(levels))
        self.level_weights = nn.Parameter(torch.zeros(levels))

    def forward(self, levels: list[Tensor], *, straight_through: bool) -> PurifierOutput:
        fused, logits, gates = [], [], []
        for f, head, denoiser in zip(levels, self.heads, self.denoisers, strict=True):
            logit = head(f).float()
            anomaly = torch.sigmoid(logit)
            gate = self.gate(anomaly, straight_through)
            # lerp is exact at both ends: where the gate is 1 nothing of f survives, not even as rounding.
            fused.append(torch.lerp(f, denoiser(f, anomaly).to(f.dtype), gate.to(f.dtype)))
            logits.append(logit)
            gates.append(gate)
        return PurifierOutput(fused, logits, gates)

    def gate(self, anomaly: Tensor, straight_through: bool) -> Tensor:
        """anomaly [B,1,h,w] in [0,1] -> 1.0 where it exceeds the threshold, else 0.0."""
        hard = (anomaly > self.threshold).to(anomaly.dtype)
        if not straight_through:
            return hard
        soft = torch.sigmoid((anomaly - self.threshold) / TEMPERATURE)
        return hard + (soft - soft.detach())  # the bracket is exactly zero

    def combine(self, anomaly_logits: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Level logits [B,1,h,w] -> logits [B,1,*size] at image resolution: their mean under learned non-negative weights."""
        maps = [F.interpolate(a, size=size, mode="bilinear", align_corners=False) for a in anomaly_logits]
        return (torch.cat(maps, dim=1) * self.level_weights.softmax(0).reshape(1, -1, 1, 1)).sum(1, keepdim=True)


def main() -> None:
    """Print the shapes and sizes of purification on a 256-channel pyramid of a 224 px image."""
    from amsdn.models.summary import print_stage

    module = SelectivePurifier(256)
    levels = [torch.rand(1, 256, s, s) for s in (56, 28, 14, 7)]
    out = module(levels, straight_through=False)
    shapes = {"levels in": levels, "levels out": out.levels, "anomaly logits": out.anomaly_logits}
    print_stage(module, shapes | {"anomaly map": module.combine(out.anomaly_logits, (224, 224))})


if __name__ == "__main__":
    main()
