"""What a model makes of one chunk of images: its answers, how sure it is of them, and what its detector saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amsdn.attacks.adaptive import vote_logits
from amsdn.attacks.base import RESCORE_DRAWS
from amsdn.attacks.losses import margin
from amsdn.errors import InputError
from amsdn.evaluation.detection import iou, map_auroc, pointing_game
from amsdn.protocols import detector_of, is_stochastic
from amsdn.threats import changed_pixels

ALARMED = 0.5  # an anomaly map says "changed" above this


@dataclass(frozen=True)
class Outcome:
    """What one attack did to one chunk; every field has one entry per sample."""

    x: Tensor
    x_adv: Tensor
    label: Tensor
    prediction: Tensor
    success: Tensor | None  # None: there is no attack
    margin: Tensor
    spent: Tensor
    forwards: Tensor
    backwards: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether the prediction is the label. An attack with another goal may fail and still have it wrong."""
        return self.prediction == self.label


@torch.no_grad()
def clean_outcome(model: nn.Module, x: Tensor, y: Tensor, chunk: Sequence[int]) -> Outcome:
    """The unattacked images as an outcome: nothing spent, one forward pass (a stochastic model: a vote of several)."""
    check_answers(model, x)
    draws = calls_of(model)
    logits = model(x).float() if draws == 1 else vote_logits(model, x, draws)  # a random model is scored as attacks score it
    if not bool(logits.isfinite().all()):
        bad = [i for i, ok in zip(chunk, logits.isfinite().all(1).tolist(), strict=True) if not ok]
        raise InputError(f"the model's logits are not finite on clean samples {bad[:5]}; check its weights and its input normalisation")
    if int(y.max()) >= logits.shape[1] or int(y.min()) < 0:
        raise InputError(
            f"the model has {logits.shape[1]} classes but the data has label {int(y.max())}; evaluate on the data it was made for"
        )
    zeros = torch.zeros(len(x), device=x.device)
    prediction = logits.argmax(1)
    return Outcome(x, x, y, prediction, None, margin(logits, y), zeros, zeros + draws, zeros)


@torch.no_grad()
def check_answers(model: nn.Module, x: Tensor) -> int:
    """How many classes the model, which may be anybody's, tells apart; raises InputError unless it answers images like these with logits [B,K]."""
    try:
        logits = model(x[:1])
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"the model fails on images {list(x.shape)} ({reason}); it must map float images [B,3,H,W] to logits [B,K]") from e
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        found = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(f"the model answers one image with {found}; it must map float images [B,3,H,W] to logits [B,K]")
    return logits.shape[1]


@torch.no_grad()
def confidence_of(model: nn.Module, outcome: Outcome) -> list[float]:
    """The probability of what was predicted of the attacked images; a random model's is the mean of several calls."""
    calls = [model(outcome.x_adv).float().softmax(1) for _ in range(calls_of(model))]
    mean = torch.stack(calls).mean(0)
    return mean.gather(1, outcome.prediction.clamp_min(0).unsqueeze(1)).squeeze(1).nan_to_num().tolist()


class Seen(NamedTuple):
    """What a detector made of attacked images, one entry each; None where there is no detector or nothing to tell."""

    scores: list[Any]
    alarms: list[Any]
    auroc: list[Any]
    pointing: list[Any]
    overlap: list[Any]


@torch.no_grad()
def seen_of(model: nn.Module, outcome: Outcome, local: bool) -> Seen:
    """Anomaly scores, decisions and (for local attacks) localisation of the attacked images.

    A random detector is asked as often as a random classifier: mean score and map, and what most calls decide.
    """
    nothing: list[Any] = [None] * len(outcome.x)
    detector = detector_of(model)
    if detector is None:
        return Seen(*[nothing] * 5)
    calls = [detector.analyze(outcome.x_adv) for _ in range(calls_of(model))]
    scores, alarms, maps = (
        sum(getattr(call, name).float() for call in calls) / len(calls) for name in ("anomaly_score", "detected", "anomaly_map")
    )
    changed = changed_pixels(outcome.x_adv, outcome.x)
    where = (map_auroc(maps, changed), pointing_game(maps, changed), iou(maps, changed, ALARMED)) if local else [nothing] * 3
    return Seen(scores.tolist(), (alarms > 0.5).tolist(), *where)


def calls_of(model: nn.Module) -> int:
    """Calls of the model that one answer takes: several of a random one."""
    return RESCORE_DRAWS if is_stochastic(model) else 1
