"""The contract of every attack: what it may ask of a model, what it must return, who checks it.

An attack is a frozen dataclass: it is its own configuration. A subclass writes ``perturb``; the base class checks
the input, checks that every returned image lies in the threat model, and rescores it on the real model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from amsdn.attacks.adaptive import Forward, bpda, expected_logits, frozen, reproducible, vote_logits
from amsdn.attacks.losses import MARGIN, Goal, Loss, margin, predicted
from amsdn.checks import insist
from amsdn.errors import InputError, ThreatViolation
from amsdn.protocols import Classifier, check_eval_mode, check_images, is_black_box, is_stochastic, surrogate_of
from amsdn.threats import ThreatModel

RESCORE_DRAWS = 25  # calls over which a random model's answer is put to the vote; odd, see vote_logits
# An attack stops early only on a vote won by this share of the calls, 19 to 6 or clearer. It votes at many steps, so by a bare
# majority it would stop at a lucky one: a fair coin wins 13 of 25 in half of the votes, 19 in one of 140. Measured on a
# linear model behind random resizing, 12 images x 24 runs: 39 % of the images survive with the bare majority, 7 % with this.
SURE = 0.45


@dataclass(frozen=True)
class AttackResult:
    """What an attack made of a batch; every field is per sample.

    ``success`` says whether the attack's own goal is reached: a wrong class, the target, or wrong and undetected; whether the
    class is right is ``prediction == y``. ``margin`` is the true label's logit minus the best other, also for a targeted
    attack. For a stochastic model, prediction, margin and success come from the vote of ``RESCORE_DRAWS`` calls.
    ``forwards`` and ``backwards`` are what the attacker spent; the base class's own rescoring is not counted.
    """

    x_adv: Tensor  # [B,3,H,W] float32, a member of the threat model around x
    success: Tensor  # [B] bool: the goal is reached on the real model
    prediction: Tensor  # [B] int64; -1 where the model answers NaN, which counts as wrong
    margin: Tensor  # [B] float32
    spent: Tensor  # [B] float32, in the unit of the threat's budget
    forwards: Tensor  # [B] int64
    backwards: Tensor  # [B] int64


@dataclass(frozen=True)
class Victim:
    """A classifier as one attack run sees it: adaptive (BPDA, EOT), free of weight gradients, and counted.

    ``rows`` says which samples of the original batch a view holds; all views count into the same two tensors.
    """

    value: Forward  # the real model
    differentiable: Forward  # the same values, with gradients that can be trusted
    value_cost: int  # forward passes per differentiable call
    stochastic: bool
    eot_samples: int
    forwards: Tensor  # [N] int64, of the original batch
    backwards: Tensor  # [N] int64
    rows: Tensor  # [B] int64
    modules: tuple[object, ...]  # everything whose parameters the passes may touch

    @classmethod
    def of(cls, model: Classifier, size: int, device: torch.device, eot_samples: int = 1) -> "Victim":
        """The model as it declares itself (see amsdn.protocols), for a batch of ``size`` samples."""
        surrogate = surrogate_of(model) if isinstance(model, nn.Module) else None
        differentiable, cost = (model, 1) if surrogate is None else (surrogate, 1)
        if surrogate is not None and not getattr(surrogate, "matches_forward", False):
            differentiable, cost = bpda(model, surrogate), 2
        return cls(model, differentiable, cost, is_stochastic(model), eot_samples, *fresh_counts(size, device), (model, surrogate))

    @property
    def draws(self) -> int:
        """Model calls per query: EOT only where the model says that it is random."""
        return self.eot_samples if self.stochastic else 1

    def select(self, rows: Tensor) -> "Victim":
        """A view of the samples that the index or mask ``rows`` chooses from this view."""
        return replace(self, rows=self.rows[rows])

    def averaging(self, eot_samples: int) -> "Victim":
        """The same victim with another number of EOT draws per query."""
        return replace(self, eot_samples=eot_samples)

    def read(self, answer: Tensor) -> Tensor:
        """One call's answer as the logits [B,K] in which the goal is expressed; a subclass may see more than classes."""
        return answer

    def logits(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] -> logits [B,K] float32 without gradients (EOT: log of the mean probability)."""
        self._count(x, forwards=self.draws, backwards=0)
        with torch.no_grad():
            return self._expected(self.value, x)

    def vote(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] -> what most of ``RESCORE_DRAWS`` calls answer, as logits [B,K]: how a random model is judged."""
        self._count(x, forwards=RESCORE_DRAWS, backwards=0)
        return self.rescore(x)[1]

    def rescore(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The real model's answer, uncounted: the logits of the classes [B,K], and those that the goal is read from.

        One call, or the vote of ``RESCORE_DRAWS`` for a random model.
        """
        with torch.no_grad():
            logits = vote_logits(self.value, x, RESCORE_DRAWS) if self.stochastic else self.value(x).float()
        return logits, logits

    def gradient(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,3,H,W], logits -> loss [B]: the gradient [B,3,H,W] of each loss by its image, the loss, the logits.

        One differentiable pass per EOT draw, whatever the loss. Entries that are not finite become zero, and a model
        without any gradient gives zeros: a masked gradient is a finding for the evaluation, not a crash.
        """
        self._count(x, forwards=self.draws * self.value_cost, backwards=self.draws)
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self._expected(self.differentiable, leaf)
            value = loss(logits)
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
            else:
                gradient = torch.zeros_like(x)
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0), value.detach(), logits.detach()

    def gradients(self, x: Tensor, losses: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,3,H,W], logits -> losses [M,B]: the gradients [M,B,3,H,W] of each loss by its image, the losses, the logits.

        One differentiable pass per EOT draw and a backward pass for each of the M losses; else as ``gradient``.
        """
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = self._expected(self.differentiable, leaf)
            values = losses(logits)
            self._count(x, forwards=self.draws * self.value_cost, backwards=self.draws * len(values))
            gradients = torch.zeros(len(values), *x.shape, device=x.device)
            for i, value in enumerate(values if values.requires_grad else ()):
                keep = i + 1 < len(values)
                (gradients[i],) = torch.autograd.grad(value.sum(), leaf, retain_graph=keep, allow_unused=True, materialize_grads=True)
        return torch.nan_to_num_(gradients, nan=0.0, posinf=0.0, neginf=0.0), values.detach(), logits.detach()

    def _expected(self, forward: Forward, x: Tensor) -> Tensor:
        return expected_logits(lambda images: self.read(forward(images)), x, self.draws)

    def _count(self, x: Tensor, *, forwards: int, backwards: int) -> None:
        assert len(x) == len(self.rows), f"{len(x)} images for a view of {len(self.rows)} samples"
        for count, passes in ((self.forwards, forwards), (self.backwards, backwards)):
            if passes:  # added, not indexed: a view may hold a sample several times
                count.index_add_(0, self.rows, self.rows.new_full(self.rows.shape, passes))


def fresh_counts(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A victim's counters of forward and backward passes [N], at zero, and the rows [N] of a whole batch."""
    counts = torch.zeros(2, size, dtype=torch.int64, device=device)
    return counts[0], counts[1], torch.arange(size, device=device)


class ActiveSet:
    """The samples that an attack still works on, and the best image found so far for each.

    ``victim``, ``x``, ``goal`` and ``threat`` are views of the active samples and shrink as samples finish.
    With ``drop=False`` (training) nothing leaves and a fooled sample may still get worse.
    """

    def __init__(self, victim: Victim, x: Tensor, goal: Goal, threat: ThreatModel, *, drop: bool = True) -> None:
        self.victim, self.x, self.goal, self.threat, self.drop = victim, x, goal, threat, drop
        self._out, self._best = x.clone(), x
        self._rows = torch.arange(len(x), device=x.device)
        self._score = torch.full((len(x),), -torch.inf, device=x.device)
        self._done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.poll_every, self._tick = _poll_every(x.device), 0

    def __len__(self) -> int:
        return len(self._rows)

    def gradient(self, x_adv: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Victim.gradient of ``loss`` towards the active samples' goal."""
        return self.victim.gradient(x_adv, lambda logits: loss(logits, self.goal))

    def query(self, x_adv: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss [B] and logits [B,K] of the active samples' images, without gradients."""
        logits = self.victim.logits(x_adv)
        return loss(logits, self.goal), logits

    def record(self, x_adv: Tensor, score: Tensor, logits: Tensor) -> Tensor | None:
        """Keep what is better; if samples left, the positions that stay (index every own tensor by them), else None."""
        better = score > self._score
        if self.drop:
            reached = self._upheld(x_adv, self.goal.reached(logits))
            better = (better | reached) & ~self._done
            self._done = self._done | reached
        self._best = torch.where(better.reshape(-1, 1, 1, 1), x_adv, self._best)
        self._score = torch.where(better, score, self._score)
        self._tick += 1
        return self._shrink() if self.drop and self._tick % self.poll_every == 0 else None

    def _upheld(self, x_adv: Tensor, reached: Tensor) -> Tensor:
        """Whose goal is reached, [B] bool. For a random model the mean answer must clearly win a vote as will judge it."""
        if not self.victim.stochastic or not bool(reached.any()):
            return reached
        at = reached.nonzero().squeeze(1)
        lead = MARGIN(self.victim.select(at).vote(x_adv[at]).exp(), self.goal.select(at))
        return reached.index_put((at,), lead >= SURE)

    def _shrink(self) -> Tensor | None:
        stay = (~self._done).nonzero().squeeze(1)
        if len(stay) == len(self):
            return None
        self._out[self._rows] = self._best
        self._best, self._score, self._done, self._rows = (t[stay] for t in (self._best, self._score, self._done, self._rows))
        self.victim, self.x = self.victim.select(stay), self.x[stay]
        self.goal, self.threat = self.goal.select(stay), self.threat.select(stay)
        return stay

    def result(self) -> Tensor:
        """The best image recorded for every sample of the original batch, [B,3,H,W]."""
        self._out[self._rows] = self._best
        return self._out

    def conclude(self, x_adv: Tensor, loss: Loss) -> Tensor:
        """The result of an iteration that ended at ``x_adv``: the last image when training, else the best, it included."""
        if not self.drop:
            return x_adv
        if len(self):
            self.record(x_adv, *self.query(x_adv, loss))
        return self.result()


def _poll_every(device: torch.device) -> int:
    """Records between two looks for finished samples: a look waits for the device, so an accelerator is asked less often."""
    return 1 if device.type == "cpu" else 8


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack within one threat model. Subclasses are frozen dataclasses and write ``threat`` and ``perturb``.

    ``eot_samples``: model calls per query if the model is stochastic. ``stop_when_fooled``: a sample leaves once its
    goal is reached and the best image is kept; adversarial training turns this off and takes the last image.
    """

    eot_samples: int = 16
    stop_when_fooled: bool = True

    def __post_init__(self) -> None:
        require(self.eot_samples >= 1, self, "eot_samples must be at least 1", self.eot_samples)
        _ = self.threat  # its constructor checks the budget

    @property
    @abstractmethod
    def threat(self) -> ThreatModel:
        """The set of images that this attack may return."""

    @property
    def evades(self) -> bool:
        """Whether the goal includes staying undetected by the model's own detector."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether it follows the model's gradients; a search that only asks for answers does not."""
        return True

    @property
    def randomised(self) -> bool:
        """Whether another seed gives another search, so that restarts are worth their cost."""
        return True

    @abstractmethod
    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        """x [B,3,H,W] -> attacked images [B,3,H,W], all members of ``threat`` around x; x is left as it is."""

    @final
    def craft(self, model: Classifier, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Attacked images for training: perturbed and checked for membership, not rescored, no input checks.

        The caller puts the model into eval mode. Parameters keep their gradients and whether they want any. Raises
        ThreatViolation as a call does; where checks are put off (``amsdn.checks``), when they are looked at. Without a
        target nothing here waits for the device.
        """
        where = type(self).__name__
        _check_budget(self.threat.budget, x, where)
        check_gradients(self, model, where)
        x, y, generator = x.detach().float(), y.long(), on_device(generator, x)
        victim = self.victim_of(model, y)
        goal = self.goal_of(y, None, lambda: victim.logits(x), generator)
        if not goal.targeted:
            return self._run(victim, x, goal, generator)
        return self._run_on(goal.exists, victim, x, goal, generator)

    @final
    def __call__(
        self, model: Classifier, x: Tensor, y: Tensor, *, targets: Tensor | None = None, generator: torch.Generator | None = None
    ) -> AttackResult:
        """Attack x [B,3,H,W] with labels y [B], towards ``targets`` [B] if given; without a generator, seed 0.

        A sample whose goal is reached by the clean image is a success with x_adv = x after one query; one without a goal
        (see ``Goal``) is no success, and x_adv = x. Raises InputError for a model in train mode or without the gradients that the
        attack follows, unusable images, labels or targets; ThreatViolation if ``perturb`` returned an image outside the threat model.
        """
        where = type(self).__name__
        check_images(x, where)
        check_eval_mode(model, where)
        check_gradients(self, model, where)
        x = x.detach().float()
        _check_budget(self.threat.budget, x, where)
        check_indices(y, x, where, "labels")
        if targets is not None:
            check_indices(targets, x, where, "targets")
        y, targets = y.long(), None if targets is None else targets.long()
        generator = on_device(generator, x)
        victim = self.victim_of(model, y)
        with ExitStack() as stack:
            stack.enter_context(frozen(*victim.modules))  # also around the scoring: a compiled model then sees one kind of weights
            if victim.stochastic:
                stack.enter_context(reproducible(x, generator))
            logits, judged = victim.rescore(x)
            victim.forwards.add_(RESCORE_DRAWS if victim.stochastic else 1)
            _check_logits(logits, x, y, targets, where)
            goal = self.goal_of(y, targets, lambda: logits, generator)
            standing = ~goal.reached(judged) & goal.exists
            x_adv = self._run_on(standing, victim, x, goal, generator)
            if bool(standing.any()):
                after = victim.select(standing).rescore(x_adv[standing])
                logits, judged = (a.masked_scatter(standing.unsqueeze(1), b) for a, b in zip((logits, judged), after, strict=True))
        return AttackResult(
            x_adv=x_adv,
            success=goal.reached(judged),
            prediction=predicted(logits),
            margin=torch.nan_to_num(margin(logits, y), nan=torch.finfo(torch.float32).min),
            spent=self.threat.spent(x_adv, x),
            forwards=victim.forwards,
            backwards=victim.backwards,
        )

    def victim_of(self, model: Classifier, y: Tensor) -> Victim:
        """The model as this attack sees it, for a batch with labels y [B]. A wrapper may look at more than the classes."""
        return Victim.of(model, len(y), y.device, self.eot_samples)

    def goal_of(self, y: Tensor, targets: Tensor | None, clean: Callable[[], Tensor], generator: torch.Generator) -> Goal:
        """What is wanted of each sample. A wrapper may choose ``targets`` itself, by the ``clean`` images' logits [B,K]."""
        return Goal(y) if targets is None else Goal(targets, targeted=True)

    def threat_on(self, victim: Victim) -> ThreatModel:
        """The threat of the samples in a view, where budgets are given per image."""
        return self.threat.select(victim.rows)

    def active(self, victim: Victim, x: Tensor, goal: Goal) -> ActiveSet:
        """A fresh active set of the given samples, under this attack's threat and settings."""
        return ActiveSet(victim, x, goal, self.threat_on(victim), drop=self.stop_when_fooled)

    def _run_on(self, chosen: Tensor, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        """x with the ``chosen`` samples [B] attacked."""
        x_adv, at = x.clone(), chosen.nonzero().squeeze(1)
        if len(at):
            x_adv[at] = self._run(victim.select(at), x[at], goal.select(at), generator)
        return x_adv

    def _run(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        with frozen(*victim.modules):
            x_adv = self.perturb(victim, x, goal, generator).detach()
        self._check_membership(victim, x_adv, x)
        return x_adv

    def _check_membership(self, victim: Victim, x_adv: Tensor, x: Tensor) -> None:
        """Raise ThreatViolation, now or later, unless all images are members of the threat. Keeps a few numbers an image until then."""
        threat = self.threat_on(victim)
        inside, spent, (low, high) = threat.contains(x_adv, x), threat.spent(x_adv, x), torch.aminmax(x_adv.flatten(1), dim=1)

        rows = victim.rows

        def violation() -> ThreatViolation:
            first = inside.tolist().index(False)
            return ThreatViolation(
                f"{type(self).__name__}: sample {int(rows[first])} of the batch is outside {threat.describe()}: it spends "
                f"{float(spent[first]):g}, pixels in [{float(low[first]):g}, {float(high[first]):g}]; this is a bug in the attack"
            )

        insist(inside.all(), violation)


def require(condition: bool, attack: object, what: str, value: object) -> None:
    """Raise InputError about a setting of an attack."""
    if not condition:
        raise InputError(f"{type(attack).__name__}: {what}, got {value}")


def check_gradients(attack: Attack, model: object, where: str) -> None:
    """Raise InputError for an attack that follows gradients, on a model that has none: it would measure nothing."""
    if attack.needs_gradients and is_black_box(model):
        raise InputError(
            f"{where}: follows gradients, and this model only answers (black_box); take a search such as square, sparse-rs or patch-rs"
        )


def require_bounded(attack: Attack) -> None:
    """Raise InputError about a budget without end, for an attack whose search is laid out by its size."""
    require(attack.threat.bounded, attack, "the budget must be finite (minimal-norm attacks take math.inf)", attack.threat.describe())


def require_at_least_one(attack: object, *names: str) -> None:
    """Raise InputError about the first of these fields of an attack that is below 1."""
    for name in names:
        require(getattr(attack, name) >= 1, attack, f"{name} must be at least 1", getattr(attack, name))


def on_device(generator: torch.Generator | None, x: Tensor) -> torch.Generator:
    """A generator that draws on x's device: the given one, a child of it where it lives elsewhere, or seed 0."""
    if generator is not None and generator.device.type == x.device.type:
        return generator
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device=x.device).manual_seed(seed)


def _check_budget(budget: float | Tensor, x: Tensor, where: str) -> None:
    if isinstance(budget, Tensor) and budget.shape != x.shape[:1]:
        raise InputError(f"{where}: budgets {list(budget.shape)} for {len(x)} images; pass one number, or a tensor of one per image")


def check_indices(classes: Tensor, x: Tensor, where: str, what: str) -> None:
    """Raise InputError unless classes are one whole number for each image of x, where the images are."""
    whole = not (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool)
    if not whole or classes.shape != x.shape[:1] or classes.device != x.device:
        raise InputError(
            f"{where}: {what} must be whole numbers [{len(x)}] on {x.device}, "
            f"got {classes.dtype} {list(classes.shape)} on {classes.device}; pass one class index per image"
        )


def _check_logits(logits: Tensor, x: Tensor, y: Tensor, targets: Tensor | None, where: str) -> None:
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise InputError(f"{where}: the classifier must return logits [{len(x)},K] with K >= 2, got {list(logits.shape)}")
    for what, classes in (("label", y), ("target", targets)):
        wrong = None if classes is None else (classes < 0) | (classes >= logits.shape[1])
        if wrong is not None and bool(wrong.any()):
            i = int(wrong.int().argmax())
            raise InputError(f"{where}: {what} {int(classes[i])} of sample {i} is outside the {logits.shape[1]} classes; check the data")  # type: ignore[index]
    if targets is not None and bool((targets == y).any()):
        raise InputError(f"{where}: the target of sample {int((targets == y).int().argmax())} is its label; choose another class")
