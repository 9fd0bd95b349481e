"""From anomaly maps to one decision an image: the detection head and the calibration of its threshold."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.purification.selective_purifier import PRIOR_LOGIT

TOP_SHARE = 0.05


class DetectionHead(nn.Module):
    """Anomaly logit maps, a list of [B,1,h,w] -> one anomaly logit an image, [B].

    A tiny network over three figures of each map: its maximum, its mean, and the mean of its highest 5 %. A patch moves
    the last two, a few changed pixels the first.
    """

    def __init__(self, maps: int, hidden: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * maps, hidden)
        self.score = nn.Linear(hidden, 1)
        nn.init.constant_(self.score.bias, PRIOR_LOGIT)

    def forward(self, maps: list[Tensor]) -> Tensor:
        # Relative to the untrained head's level, so that the network starts with inputs near zero.
        figures = torch.cat([_figures(m.float() - PRIOR_LOGIT) for m in maps], dim=1)
        out: Tensor = self.score(F.gelu(self.hidden(figures)))
        return out.float().squeeze(1)


def _figures(logits: Tensor) -> Tensor:
    """[B,1,h,w] -> maximum, mean and mean of the highest 5 % (at least one location), [B,3]."""
    flat = logits.flatten(1)
    top = flat.topk(max(math.ceil(TOP_SHARE * flat.shape[1]), 1), dim=1).values
    return torch.stack([top[:, 0], flat.mean(1), top.mean(1)], dim=1)


def conformal_threshold(clean_scores: Tensor, false_positive_rate: float) -> float:
    """The threshold t for the rule "detected if score > t" that clean images pass with the stated rate.

    With N scores sorted upwards, t is the ceil((N+1)(1-rate))-th (split conformal prediction, Vovk et al. 2005): for a
    fresh clean image drawn as the N were, P(score > t) <= rate, and at most N * rate of the N lie above t. A score equal to t is
    not detected, so ties only lower the rate. With fewer than 1/rate - 1 scores no finite rank will do, and t = 1: nothing
    is ever detected. Raises InputError for a rate outside (0,1), no scores, or scores outside [0,1].
    """
    scores = clean_scores.detach().float().flatten()  # float32, as the scores that will be compared with it
    if not 0 < false_positive_rate < 1:
        raise InputError(f"false_positive_rate must lie in (0, 1), got {false_positive_rate}; 0.05 is the default")
    if scores.numel() == 0:
        raise InputError("calibrate: needs the anomaly scores of at least one clean image, got none; pass the validation set's")
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise InputError("calibrate: clean scores must be finite and lie in [0,1]; pass analyze(x).anomaly_score, not logits")
    count = scores.numel()
    above = math.floor((count + 1) * false_positive_rate + 1e-9)  # how many of N+1 may exceed it; the slack undoes 100 * 0.29 < 29
    return 1.0 if above == 0 else float(scores.sort().values[count - above])
