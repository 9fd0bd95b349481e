"""How well a detector tells attacked images from clean ones, and where it points.

Scores are anomaly scores, larger meaning more suspicious. A threshold always comes from clean scores alone:
an image is flagged where its score lies strictly above it, so that ties never push the false-positive rate
beyond what was asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from amsdn.evaluation.statistics import CONFIDENCE, Proportion, proportion


@dataclass(frozen=True)
class Auroc:
    """The probability that an attacked image scores above a clean one (ties count half), with its interval."""

    value: float
    low: float
    high: float


def auroc(clean: Sequence[float], attacked: Sequence[float], confidence: float = CONFIDENCE) -> Auroc | None:
    """Area under the ROC curve of attacked against clean scores; None where either side is empty.

    The interval inverts a score test with the Hanley-McNeil variance (Newcombe 2006, method 5), which unlike
    value +- 2 SE is honest at 1.0 and for few samples. It takes all scores as independent. Clean and attacked scores
    of the same images are usually positively correlated, which makes the true interval narrower, not wider.
    """
    if not clean or not attacked:
        return None
    value = float(roc_auc_score([0] * len(clean) + [1] * len(attacked), [*clean, *attacked]))
    low, high = _auroc_interval(value, len(attacked), len(clean), confidence)
    return Auroc(value, low, high)


def threshold_at_fpr(clean: Sequence[float], fpr: float) -> float:
    """The lowest clean score above which at most a share ``fpr`` of the clean scores lies; ``clean`` must not be empty."""
    assert 0 <= fpr < 1, fpr
    assert len(clean) > 0
    return sorted(clean, reverse=True)[_floor(fpr * len(clean))]


def tpr_at_fpr(
    clean: Sequence[float], attacked: Sequence[float], fpr: float, confidence: float = CONFIDENCE
) -> tuple[Proportion, float] | None:
    """The share of attacked images flagged at the threshold that flags at most ``fpr`` of the clean ones, and the threshold.

    The interval (Wilson) is for this threshold as it stands; that the threshold was itself estimated is not in it.
    None where there are no clean scores.
    """
    if not clean:
        return None
    threshold = threshold_at_fpr(clean, fpr)
    return proportion(sum(score > threshold for score in attacked), len(attacked), confidence), threshold


def roc_points(clean: Sequence[float], attacked: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of the ROC curve as (false-positive rate, true-positive rate), from (0,0) to (1,1); empty where either side is."""
    if not clean or not attacked:
        return []
    false_positive, true_positive, _ = roc_curve([0] * len(clean) + [1] * len(attacked), [*clean, *attacked])
    return [(float(f), float(t)) for f, t in zip(false_positive, true_positive, strict=True)]


def map_auroc(anomaly_map: Tensor, changed: Tensor) -> list[float | None]:
    """anomaly_map [B,1,H,W], changed [B,1,H,W] bool -> per image, the probability that a changed pixel outscores an unchanged one.

    None where no pixel changed or all did, since then there is nothing to localise.
    """
    found: list[float | None] = []
    for scores, mask in zip(_rows(anomaly_map), _rows(changed), strict=True):
        found.append(float(roc_auc_score(mask, scores)) if 0 < mask.sum() < mask.size else None)
    return found


def iou(anomaly_map: Tensor, changed: Tensor, threshold: float) -> list[float | None]:
    """Overlap of {map > threshold} with the changed pixels, per image: intersection over union; None where nothing changed."""
    flagged, truth = (anomaly_map > threshold).flatten(1), changed.flatten(1)
    union = (flagged | truth).sum(1).tolist()
    both = (flagged & truth).sum(1).tolist()
    return [b / u if any_change else None for b, u, any_change in zip(both, union, truth.any(1).tolist(), strict=True)]


def pointing_game(anomaly_map: Tensor, changed: Tensor) -> list[float | None]:
    """Whether the map's largest value lies on a changed pixel, per image (Zhang et al. 2018); None where nothing changed.

    Where several pixels share the largest value the result is the share of them that changed, so a constant map
    scores what a random guess would.
    """
    scores, truth = anomaly_map.flatten(1), changed.flatten(1)
    top = scores == scores.amax(1, keepdim=True)
    hit = ((top & truth).sum(1) / top.sum(1)).tolist()
    return [h if any_change else None for h, any_change in zip(hit, truth.any(1).tolist(), strict=True)]


def _auroc_interval(value: float, positives: int, negatives: int, confidence: float) -> tuple[float, float]:
    """The true areas that a score test at this confidence would not reject."""
    z = float(ndtri((1 + confidence) / 2))
    centre = (positives + negatives) / 2 - 1

    def excess(area: float) -> float:
        spread = 1 + centre * ((1 - area) / (2 - area) + area / (1 + area))
        return (value - area) ** 2 - z**2 * area * (1 - area) * spread / (positives * negatives)

    inside = min(max(value, 1e-12), 1 - 1e-12)  # at 0 and 1 the value itself is a root, but not the end we look for
    low = 0.0 if value == 0 else float(optimize.brentq(excess, 0.0, inside))
    high = 1.0 if value == 1 else float(optimize.brentq(excess, inside, 1.0))
    return low, high


def _rows(maps: Tensor) -> list[np.ndarray]:
    return list(maps.detach().flatten(1).cpu().float().numpy())


def _floor(value: float) -> int:
    """The floor of a product that may have landed a rounding error below a whole number (0.05 * 20, say)."""
    return math.floor(value + 1e-9)
