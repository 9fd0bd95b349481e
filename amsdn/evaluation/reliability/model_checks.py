"""What must hold of a model before any attack on it says something: its answers repeat, are its own, and have a gradient that leads somewhere."""

from collections.abc import Callable

import torch
from torch import Tensor

from amsdn.attacks.base import Victim
from amsdn.attacks.losses import CROSS_ENTROPY, Goal
from amsdn.evaluation.reliability.finding import Finding
from amsdn.protocols import Classifier, detector_of, is_black_box, is_stochastic, threshold_of

ROUNDING = 1e-3  # relative to the largest logit: what other company, or another call, may change of an answer
SUMS_TO_ONE = 1e-4
NO_GRADIENT = 0.02  # of images
LEADS_UP = 0.9  # of images
TINY_STEPS = (0.5 / 255, 1 / 255)  # of every channel: small beside any budget, large beside the waves of a shattered gradient
FAIR_PART = 0.2  # of the rise that the gradient promises
CALLS = 6


def model_findings(model: Classifier, x: Tensor, y: Tensor) -> list[Finding]:
    """All checks of this module on images [N,3,H,W] with labels y [N]; a few dozen will do."""
    return [check(model, x, y) for check in CHECKS]


def repeats(model: Classifier, x: Tensor, y: Tensor) -> Finding:
    """Calls agree, unless the model declares itself random: else attacks neither average over draws nor vote."""
    if is_stochastic(model):
        return Finding("repeats", True, 0.0, ROUNDING, "the model says that it is random")
    calls = torch.stack([_logits(model, x) for _ in range(CALLS)])
    moved = float((calls - calls[0]).abs().amax() / _scale(calls))
    told = f"calls differ by {moved:.2g} of the largest logit: declare stochastic = True, so that attacks average over draws"
    return Finding("repeats", moved <= ROUNDING, moved, ROUNDING, told)


def judges_alone(model: Classifier, x: Tensor, y: Tensor) -> Finding:
    """An image's logits do not depend on its company: else attacked images, or labels, leak to one another through batch statistics."""
    if is_stochastic(model):
        return Finding("judges alone", True, 0.0, ROUNDING, "not applicable to a random model")
    together = _logits(model, x)
    alone = torch.cat([_logits(model, image) for image in x.split(1)])
    order = y.argsort(stable=True)
    half = order[: max(len(order) // 2, 1)]  # of few classes, as an evaluation in label order would show them
    moved = float(
        torch.maximum((together - alone).abs().amax(), (together[half] - _logits(model, x[half])).abs().amax()) / _scale(together)
    )
    told = f"in other company an image's logits change by {moved:.2g} of the largest: batch statistics leak between images; evaluate in eval mode"
    return Finding("judges alone", moved <= ROUNDING, moved, ROUNDING, told)


def detects_openly(model: Classifier, x: Tensor, y: Tensor) -> Finding:
    """The detector is part of the same model: it answers as the model does, judges every image alone, and alarms where it says it does.

    Else attacks that climb its score, or stay below its threshold, look at something else than what judges them.
    """
    detector = detector_of(model)
    if detector is None or is_stochastic(model):
        return Finding("detects openly", True, 0.0, ROUNDING, "not applicable without a detector, or to a random one")
    with torch.no_grad():
        together, half = detector.analyze(x), detector.analyze(x[: max(len(x) // 2, 1)])
    own = _logits(model, x)
    answers = (together.logits.float() - own).abs().amax() / _scale(own)
    company = (together.anomaly_score[: len(half.anomaly_score)] - half.anomaly_score).abs().amax()
    threshold = threshold_of(model)
    silent = 0.0 if threshold is None else float((together.detected != (together.anomaly_score > threshold.to(x.device))).float().mean())
    moved = max(float(answers), float(company), silent)
    told = (
        f"the detector's answers differ from the model's by {float(answers):.2g} of the largest logit, its scores by {float(company):.2g} in other "
        f"company, and {100 * silent:.0f} % of alarms are not where score and threshold say: attacks on it aim at something else than what judges them"
    )
    return Finding("detects openly", moved <= ROUNDING, moved, ROUNDING, told)


def gives_logits(model: Classifier, x: Tensor, y: Tensor) -> Finding:
    """The outputs are no probabilities: losses take another softmax of them, which flattens every gradient."""
    answers = _logits(model, x)
    off = float((answers.sum(1) - 1).abs().amax())
    probabilities = bool((answers >= 0).all()) and off <= SUMS_TO_ONE
    told = "the outputs are probabilities, of which losses take another softmax: return logits (or their logarithms)"
    return Finding("gives logits", not probabilities, off, SUMS_TO_ONE, told if probabilities else "the outputs are no probabilities")


def has_gradients(model: Classifier, x: Tensor, y: Tensor) -> Finding:
    """The loss has a gradient by the image that is finite and not zero, through the declared surrogate if there is one."""
    if is_black_box(model):
        told = "the model gives no gradients: it was attacked by queries alone, which break less than gradients would"
        return Finding("has gradients", False, 1.0, NO_GRADIENT, told)
    gradient = _gradient(model, x, y)
    missing = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
    told = f"{100 * missing:.0f} % of images have no gradient, or one that is not finite: gradient attacks stand still there"
    return Finding("has gradients", missing <= NO_GRADIENT, missing, NO_GRADIENT, told)


def leads_up(model: Classifier, x: Tensor, y: Tensor) -> Finding:
    """Tiny steps along the gradient's signs raise the loss, by a fair part of what the gradient promises: else it is shattered or misleads.

    Images without a gradient are ``has_gradients``' business.
    """
    victim, goal = Victim.of(model, len(x), x.device), Goal(y)
    gradient, before, _ = victim.gradient(x, lambda logits: CROSS_ENTROPY(logits, goal))
    moves = gradient.flatten(1).abs().amax(1) > 0
    kept = torch.ones_like(moves)
    for step in TINY_STEPS:
        x_up = (x + step * gradient.sign()).clamp(0, 1)
        promised = (gradient * (x_up - x)).flatten(1).sum(1)
        kept &= CROSS_ENTROPY(victim.logits(x_up), goal) - before >= FAIR_PART * promised
    share = float(kept[moves].float().mean()) if bool(moves.any()) else 1.0
    told = (
        f"tiny steps along the gradient raise the loss as it promises for only {100 * share:.0f} % of images: it is shattered or misleads"
    )
    return Finding("leads up", share >= LEADS_UP, share, LEADS_UP, told)


CHECKS: tuple[Callable[[Classifier, Tensor, Tensor], Finding], ...] = (
    repeats,
    judges_alone,
    detects_openly,
    gives_logits,
    has_gradients,
    leads_up,
)


def _logits(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).float()


def _scale(logits: Tensor) -> Tensor:
    return logits.abs().amax().clamp_min(torch.finfo(logits.dtype).tiny)


def _gradient(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    goal = Goal(y)
    return Victim.of(model, len(x), x.device).gradient(x, lambda logits: CROSS_ENTROPY(logits, goal))[0]
