"""Selective purification: find anomalous locations, rebuild them from the others, leave the rest alone.

``python -m amsdn.models.purification.selective_purifier`` prints shapes and parameter counts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.layout import weighted_space_means
from amsdn.models.pooling import evidence_weights, to_unit_length

PRIOR = 0.02  # anomaly that an untrained head reports everywhere
PRIOR_LOGIT = math.log(PRIOR / (1 - PRIOR))
TEMPERATURE = 0.1  # width of the soft gate, in units of anomaly
MIN_MASS = 1e-4  # share of un-anomalous locations below which there is nothing to rebuild from


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
    """What an anomalous location should have said, from the rest of its level: the mean over un-anomalous surroundings [B,C] -> [B,C].

    The surroundings are all of the level, not a window: one as large as the patch would hold nothing else, and what is rebuilt goes
    into a mean over all locations anyway. A window, rebuilding maps, made a training step dearer
    (docs/training/ablations.md). Starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)
        nn.init.eye_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, surroundings: Tensor) -> Tensor:
        out: Tensor = self.mix(surroundings)
        return out


class PurifierOutput(NamedTuple):
    """Per level: purified evidence [B,C], anomaly logits [B,1,h,w] and the gates [B,1,h,w] in {0,1} that were applied."""

    evidence: list[Tensor]
    anomaly_logits: list[Tensor]
    gates: list[Tensor]


class SelectivePurifier(nn.Module):
    """Levels [B,C,h,w] -> their means over locations [B,C], of which every anomalous location is replaced by a rebuilt one.

    A location whose anomaly exceeds ``threshold`` is gated: it has exactly no influence on the evidence, neither by itself nor on
    what stands in its place, which is rebuilt from the locations that are not gated, each counting with weight 1 - anomaly (a normalised
    average, Knutsson and Westin 1993). All others are passed on untouched. Where all of a level is gated nothing is known: the bias of
    ``mix`` alone stands in. The rebuilt maps themselves are never made: their mean is a weighted mean of f plus a share of what was rebuilt.

    With ``straight_through`` the gate's value is the same hard one, but its gradient is that of
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

    def forward(
        self, levels: list[Tensor], attention: list[Tensor] | None = None, *, bounded: bool = False, straight_through: bool
    ) -> PurifierOutput:
        """``attention`` [B,1,h,w] a level and ``bounded`` are as in ``pooling``: what each location counts."""
        evidence, logits, gates = [], [], []
        for number, (f, head) in enumerate(zip(levels, self.heads, strict=True)):
            logit = head(f).float()
            anomaly = torch.sigmoid(logit)
            gate = self.gate(anomaly, straight_through)
            weight = torch.ones_like(gate) if attention is None else attention[number]
            evidence.append(self._evidence(number, f, anomaly, gate, weight, bounded))
            logits.append(logit)
            gates.append(gate)
        return PurifierOutput(evidence, logits, gates)

    def _evidence(self, number: int, f: Tensor, anomaly: Tensor, gate: Tensor, weight: Tensor, bounded: bool) -> Tensor:
        counts = evidence_weights(f, weight, bounded=bounded)
        assert counts is not None
        spared, trust = (1 - gate) * counts, 1 - anomaly
        kept, around = weighted_space_means(f, torch.cat([spared, spared * trust], dim=1)).unbind(1)
        # The mass is a single channel: full precision is free, and a rounded one would bias the mean.
        mass = ((1 - gate) * weight * trust).mean((2, 3)).clamp_min(MIN_MASS)
        rebuilt = self.denoisers[number](around / mass.to(around.dtype))
        stands_in = (gate * weight).mean((2, 3))
        if bounded:
            stands_in = stands_in * to_unit_length(rebuilt)
        return kept + stands_in.to(kept.dtype) * rebuilt.to(kept.dtype)

    def gate(self, anomaly: Tensor, straight_through: bool) -> Tensor:
        """anomaly [B,1,h,w] in [0,1] -> 1.0 where it exceeds the threshold, else 0.0."""
        hard = (anomaly > self.threshold).to(anomaly.dtype)
        if not straight_through:
            return hard
        soft = torch.sigmoid((anomaly - self.threshold) / TEMPERATURE)
        return hard + (soft - soft.detach())  # the bracket is exactly zero

    def combine(self, anomaly_logits: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Level logits [B,1,h,w] -> logits [B,1,*size] at image resolution: their mean under learned non-negative weights."""
        shares = self.level_weights.softmax(0)
        return torch.stack([share * _enlarged(a, size) for share, a in zip(shares, anomaly_logits, strict=True)]).sum(0)


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B,1,h,w] -> [B,1,*size], bilinearly, as two matrix products: on one channel ``F.interpolate`` is several times slower backwards."""

    def along(side: int, target: int) -> Tensor:
        unit = torch.eye(side, device=maps.device, dtype=maps.dtype)
        return F.interpolate(unit[None], size=target, mode="linear", align_corners=False)[0]

    return along(maps.shape[2], size[0]).T @ maps @ along(maps.shape[3], size[1])


def main() -> None:
    """Print the shapes and sizes of purification on a 256-channel pyramid of a 224 px image."""
    from amsdn.models.summary import print_stage

    module = SelectivePurifier(256)
    levels = [torch.rand(1, 256, s, s) for s in (56, 28, 14, 7)]
    out = module(levels, straight_through=False)
    shapes = {"levels in": levels, "evidence": out.evidence, "anomaly logits": out.anomaly_logits}
    print_stage(module, shapes | {"anomaly map": module.combine(out.anomaly_logits, (224, 224))})


if __name__ == "__main__":
    main()
