"""Attacks that must fool the classifier and stay below the detector's alarm, by any attack of the suite.

A detecting model is turned into logits on which "wrong and undetected" is an ordinary misclassification. Detection becomes
an extra logit that is the largest exactly where the detector raises the alarm (Carlini & Wagner, AISec 2017), and the
label's logit becomes the larger of itself and that one: whatever raises it is bad for the attacker. Every loss,
search and cascade then works as it is, and the direction that a gradient attack follows is left to a ``GradientRule``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from amsdn.attacks.adaptive import Forward, bpda, log_mean_probability, tally
from amsdn.attacks.base import RESCORE_DRAWS, Victim, fresh_counts, require
from amsdn.attacks.losses import Goal
from amsdn.attacks.wrapper import Wrapper
from amsdn.errors import InputError
from amsdn.protocols import Analysis, Classifier, detector_of, is_stochastic, surrogate_of, threshold_of

PARALLEL = 1e-3  # below this share of its length, what is left of an orthogonalised gradient is rounding noise


@dataclass(frozen=True)
class Sight:
    """A detecting model in one call: images -> [B,K+1] float32, the class logits and then the detection logit.

    The detection logit is the largest class logit plus ``scale`` x (log-odds of the anomaly score - those of the threshold).
    The paper multiplies the largest logit by 1 + the detector's logit, which turns over where that logit is negative. Its
    side agrees with the model's own ``detected`` to the last bit. A detector that declares no ``threshold`` has
    its score on a step that is up where it detects; the gradient stays that of the log-odds.
    """

    analyze: Callable[[Tensor], Analysis]
    threshold: Tensor | None  # where the answers are
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        analysis = self.analyze(x)
        logits, odds = analysis.logits.float(), log_odds(analysis)
        if logits.ndim != 2 or odds.shape != logits.shape[:1] or analysis.detected.shape != odds.shape:
            raise InputError(
                f"EvadeDetector: analyze must give logits [B,K] and one anomaly_score and detected an image, got "
                f"{list(logits.shape)}, {list(odds.shape)} and {list(analysis.detected.shape)}"
            )
        if self.threshold is None:
            step = torch.where(analysis.detected, 1.0, -2.0) + analysis.anomaly_score.float()  # in [1,2] or [-2,-1]
            excess = with_slope(step, odds)
        else:
            excess = odds - _logit(self.threshold)
        top = logits.amax(1)
        detection = top + self.scale * excess
        high, low = (torch.nextafter(top, torch.full_like(top, bound)) for bound in (torch.inf, -torch.inf))
        side = torch.where(analysis.detected, torch.maximum(detection, high), torch.minimum(detection, low))
        return torch.cat([logits, with_slope(side, detection).unsqueeze(1)], 1)


def log_odds(analysis: Analysis) -> Tensor:
    """The anomaly score as log-odds [B] float32, with a gradient that outlives the rounding of the score where that can be.

    ``anomaly_logit`` is taken where it is offered and its sigmoid is the score (a defence may add more to the score).
    """
    score = analysis.anomaly_score.float()
    odds, offered = _logit(score), getattr(analysis, "anomaly_logit", None)
    if offered is None:
        return odds
    return torch.where((offered.float().sigmoid() - score).abs() <= 1e-6, offered.float(), odds)


def _logit(p: Tensor) -> Tensor:
    """log p - log(1 - p), finite on all of [0,1]."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log() - (1 - p).clamp_min(torch.finfo(p.dtype).eps / 4).log()


def fold(answer: Tensor, labels: Tensor) -> Tensor:
    """[B,K+1] of ``Sight`` -> [B,K], the label's logit raised to the detection logit where that is larger.

    The prediction on it is some other class exactly if the model's is and the detector is silent; ties aside.
    """
    logits, detection = answer[:, :-1], answer[:, -1:]
    own = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    return torch.where(own, torch.maximum(logits, detection), logits)


@dataclass(frozen=True)
class Objectives:
    """Per sample, what a gradient rule may climb, and where the sample stands; all [B]."""

    joint: Tensor  # the attack's loss on the folded logits
    classifier: Tensor  # the attack's loss on the class logits alone
    detector: Tensor  # how far the score is below the threshold, in log-odds
    fooled: Tensor  # bool: the class is what is wanted
    detected: Tensor  # bool


Slope = Callable[[Tensor, bool], Tensor]  # values [B], whether another slope will follow -> gradient [B,3,H,W]


class GradientRule(ABC):
    """How the classifier's and the detector's gradients become the one that an attack follows."""

    backwards: ClassVar[int] = 1  # backward passes it takes

    @abstractmethod
    def __call__(self, objectives: Objectives, slope: Slope) -> Tensor:
        """The gradient to climb, [B,3,H,W]."""


class Joint(GradientRule):
    """The gradient of the attack's loss on the folded logits, a sum of both where both are against the attacker."""

    def __call__(self, objectives: Objectives, slope: Slope) -> Tensor:
        return slope(objectives.joint, False)


class Selective(GradientRule):
    """One aim at a time: the classifier's gradient until it is fooled, then the detector's while it is alarmed.

    Selective projected gradient descent of Bryniarski et al. (ICLR 2022). Each sample has one aim, so one backward pass of
    the chosen values serves the batch. A sample that has reached both and is still here climbs the joint loss; in the
    paper its loss is constant.
    """

    def __call__(self, objectives: Objectives, slope: Slope) -> Tensor:
        o = objectives
        rest = torch.where(o.detected, o.detector, o.joint)
        return slope(torch.where(o.fooled, rest, o.classifier), False)


class Orthogonal(GradientRule):
    """As ``Selective``, and each gradient without its component along the other, so that a step for one keeps the other.

    Orthogonal projected gradient descent of Bryniarski et al. (ICLR 2022). Deviation: where nothing is left, because both
    gradients lie on one line, the gradient is taken as it is. Since no step trades one aim for the other, it
    cannot spend what the alarm still leaves: see ``Selective`` for that.
    """

    backwards = 2

    def __call__(self, objectives: Objectives, slope: Slope) -> Tensor:
        o = objectives
        classifier, detector = slope(o.classifier, True), slope(o.detector, False)
        hide = (o.fooled & o.detected).reshape(-1, 1, 1, 1)
        aim, keep = torch.where(hide, detector, classifier), torch.where(hide, classifier, detector)
        return without_component(aim, keep)


def without_component(aim: Tensor, along: Tensor) -> Tensor:
    """``aim`` [B,3,H,W] less its component along ``along``; all of it, where both lie on one line."""
    (aim, length), (along, _) = _scaled(aim), _scaled(along)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3), keepdim=True)

    rest = aim - inner(aim, along) / inner(along, along).clamp_min(torch.finfo(aim.dtype).tiny) * along
    kept = inner(rest, rest) > PARALLEL**2 * inner(aim, aim)
    return length * torch.where(kept, rest, aim)


def _scaled(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with its largest entry 1, and that entry [B,1,1,1]: squares of a confident model's gradients vanish."""
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    return gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny), largest


@dataclass(frozen=True)
class EvadingVictim(Victim):
    """A detecting model as an attacker sees it who must not be detected. ``value`` and ``differentiable`` are as ``Sight``.

    The rule decides on ``gradient`` alone. ``gradients``, for attacks that walk to a boundary, stays that of the folded
    logits: a plane needs the value and the gradient of one function. Where the class is wrong and the alarm rings, its
    boundary to the class in front is the alarm's threshold itself, so that is where such an attack then goes.
    """

    labels: Tensor  # [N] of the original batch
    rule: GradientRule
    goal: Goal  # of the samples under attack
    place: Tensor  # [N], where in the goal a sample of the original batch is

    @classmethod
    def watching(cls, model: Classifier, y: Tensor, rule: GradientRule, scale: float, eot_samples: int) -> "EvadingVictim":
        """The model as it declares itself, for a batch with labels y [B]; raises InputError for one without a detector."""
        detector = detector_of(model)
        if detector is None:
            raise InputError("EvadeDetector: the model has no detector (see amsdn.protocols.Detector); run the attack inside it instead")
        threshold = threshold_of(model)
        value = Sight(detector.analyze, None if threshold is None else threshold.to(y.device), scale)
        surrogate = surrogate_of(model) if isinstance(model, nn.Module) else None
        differentiable, cost = _trusted(value, surrogate)
        forwards, backwards, rows = fresh_counts(len(y), y.device)
        modules = (model, surrogate)
        return cls(
            value, differentiable, cost, is_stochastic(model), eot_samples, forwards, backwards, rows, modules, y, rule, Goal(y), rows
        )

    def aiming(self, goal: Goal) -> "EvadingVictim":
        """The same view, told what is wanted of its samples."""
        place = torch.zeros_like(self.labels).index_copy(0, self.rows, torch.arange(len(self.rows), device=self.rows.device))
        return replace(self, goal=goal, place=place)

    def read(self, answer: Tensor) -> Tensor:
        return fold(answer, self.labels[self.rows])

    def rescore(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As for any victim. In a vote, a call on which the detector raises the alarm counts for the label.

        Winning it takes a wrong class and silence together in most calls: then both also hold in their own votes.
        """
        with torch.no_grad():
            answers = [self.value(x) for _ in range(RESCORE_DRAWS if self.stochastic else 1)]
        classes, folded = [a[:, :-1] for a in answers], [self.read(a) for a in answers]
        return (tally(classes), tally(folded)) if self.stochastic else (classes[0], folded[0])

    def gradient(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As for any victim, with loss and logits of the folded answer; the gradient is that of the rule."""
        self._count(x, forwards=self.draws * self.value_cost, backwards=self.draws * self.rule.backwards)
        leaf = x.detach().requires_grad_(True)

        def slope(values: Tensor, again: bool) -> Tensor:
            if not values.requires_grad:
                return torch.zeros_like(x)
            (found,) = torch.autograd.grad(values.sum(), leaf, retain_graph=again, allow_unused=True, materialize_grads=True)
            return torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)

        with torch.enable_grad():
            answers = [self.differentiable(leaf) for _ in range(self.draws)]
            logits = log_mean_probability([self.read(a) for a in answers])
            value = loss(logits)
            gradient = self.rule(self._objectives(answers, value, loss), slope)
        return gradient, value.detach(), logits.detach()

    def _objectives(self, answers: list[Tensor], joint: Tensor, loss: Callable[[Tensor], Tensor]) -> Objectives:
        classes = log_mean_probability([a[:, :-1] for a in answers])
        above = torch.stack([a[:, -1] - a[:, :-1].amax(1) for a in answers]).mean(0)
        fooled = self.goal.select(self.place[self.rows]).reached(classes)
        return Objectives(joint, loss(classes), -above, fooled, above > 0)


def _trusted(value: Sight, surrogate: nn.Module | None) -> tuple[Forward, int]:
    """What to differentiate, and its forward passes per call. A surrogate that cannot analyze stands in for the class logits only."""
    if surrogate is None:
        return value, 1
    analyze = getattr(surrogate, "analyze", None)
    if callable(analyze):
        stand_in = replace(value, analyze=analyze)
        return (stand_in, 1) if getattr(surrogate, "matches_forward", False) else (bpda(value, stand_in), 2)

    def classes_by_surrogate(x: Tensor) -> Tensor:
        answer = value(x)
        classes = with_slope(answer[:, :-1], surrogate(x).float())
        excess = answer[:, -1:] - answer[:, :-1].amax(1, keepdim=True)
        return torch.cat([classes, with_slope(answer[:, -1:], classes.amax(1, keepdim=True) + excess)], 1)

    return classes_by_surrogate, 2


def with_slope(value: Tensor, carrier: Tensor) -> Tensor:
    """The numbers of ``value``, to the last bit, with the gradient of ``carrier``."""
    return value.detach() + (carrier - carrier.detach())


RULES: dict[str, type[GradientRule]] = {"selective": Selective, "orthogonal": Orthogonal, "joint": Joint}


@dataclass(frozen=True)
class EvadeDetector(Wrapper):
    """``attack``, for the goal "fooled and not detected"; targeted alike. Raises InputError for a model without a detector.

    Gradient attacks follow ``gradients``: ``selective``, ``orthogonal`` or ``joint`` (see the rules of these names); search
    attacks and the comparison of steps use the folded loss under each. DeepFool and FAB, also inside AutoAttack, walk to the
    boundaries of the folded logits whatever ``gradients`` says (see ``EvadingVictim``). ``scale`` weighs the detector's log-odds
    against the logits in that loss. One pass gives classes and detection; ``orthogonal`` takes a second backward pass.
    The result's ``success`` means wrong (or the target) and undetected on the real model, its ``prediction`` is the class.
    """

    gradients: Literal["selective", "orthogonal", "joint"] = "selective"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gradients in RULES, self, f"gradients must be one of {', '.join(RULES)}", self.gradients)
        require(self.scale > 0, self, "scale must be positive", self.scale)

    @property
    def evades(self) -> bool:
        return True

    def victim_of(self, model: Classifier, y: Tensor) -> Victim:
        return EvadingVictim.watching(model, y, RULES[self.gradients](), self.scale, self.part.eot_samples)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        if not isinstance(victim, EvadingVictim):
            raise InputError("EvadeDetector: must stand outside of other attacks; write EvadeDetector(Restarts(...))")
        return super().perturb(victim.aiming(goal), x, goal, generator)
