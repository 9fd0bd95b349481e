"""Auto-PGD: projected gradient descent that sets its own step size, for Linf, L2 and L1, untargeted and by target class.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", ICML
2020 (Linf, L2), and "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021 (L1). Each
sample's step size follows its own loss only. Random restarts are compose.Restarts.
"""

from abc import abstractmethod
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from amsdn.attacks.base import ActiveSet, Attack, Victim, require, require_bounded
from amsdn.attacks.losses import CROSS_ENTROPY, MARGIN, TARGETED_DLR, Goal, Loss, Towards
from amsdn.threats import L1Ball, L2Ball, LinfBall, NormBall

MOMENTUM = 0.75  # share of the new step; the rest repeats the step before
WIDENING = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # L1: radii in multiples of epsilon, and their shares of the steps


@dataclass(frozen=True)
class _APGD(Attack):
    """What all variants share: an active set, and one climb on it."""

    epsilon: float
    num_steps: int = 100
    loss: Loss = CROSS_ENTROPY

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_steps >= 1, self, "num_steps must be at least 1", self.num_steps)
        require_bounded(self)

    @property
    @abstractmethod
    def threat(self) -> NormBall: ...

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        active = self.active(victim, x, goal)
        self._climb(active, generator)
        return active.result()

    @abstractmethod
    def _climb(self, active: ActiveSet, generator: torch.Generator) -> None:
        """One search from one random start, recorded in ``active``."""

    def _score(self, loss: Tensor, logits: Tensor, goal: Goal) -> Tensor:
        """By what the best image of a sample that stands is chosen, [B]."""
        return loss

    def _record(self, active: ActiveSet, x_adv: Tensor, loss: Tensor, logits: Tensor) -> Tensor | None:
        return active.record(x_adv, self._score(loss, logits, active.goal), logits)

    def _record_last(self, active: ActiveSet, x_adv: Tensor) -> None:
        """Score the image that the last step led to, and let finished samples leave before another climb."""
        often, active.poll_every = active.poll_every, 1
        self._record(active, x_adv, *active.query(x_adv, self.loss))
        active.poll_every = often


@dataclass
class _Path:
    """Where the search of each active sample stands, and the best point on its way."""

    here: Tensor  # [B,3,H,W]
    best: Tensor  # [B,3,H,W]
    best_gradient: Tensor  # [B,3,H,W]
    best_loss: Tensor  # [B]
    step: Tensor  # [B,1,1,1]

    def select(self, stay: Tensor) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name)[stay])

    def observe(self, gradient: Tensor, loss: Tensor) -> None:
        """Note the gradient and loss [B] of ``here``."""
        self._keep_best(loss > self.best_loss, gradient, loss)

    def _keep_best(self, better: Tensor, gradient: Tensor, loss: Tensor) -> None:
        self.best, self.best_gradient = _where(better, self.here, self.best), _where(better, gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def back_to_best(self, those: Tensor, gradient: Tensor) -> Tensor:
        """Let the samples ``those`` [B] go on from their best point; the gradient from which each goes on."""
        self.here = _where(those, self.best, self.here)
        return _where(those, self.best_gradient, gradient)


@dataclass
class _HalvingPath(_Path):
    """Algorithm 1 of Croce & Hein (2020): momentum, and a step that is halved at checkpoints that brought too little."""

    before: Tensor  # [B,3,H,W]: the point one step back
    last_loss: Tensor  # [B]
    rises: Tensor  # [B]: steps since the last checkpoint that raised the loss
    checked_loss: Tensor  # [B]: best loss at the last checkpoint
    halved: Tensor  # [B] bool: at the last checkpoint; true before the first one

    @classmethod
    def start(cls, x: Tensor, epsilon: float | Tensor) -> "_HalvingPath":
        nothing = torch.full((len(x),), -torch.inf, device=x.device)
        return cls(
            here=x,
            best=x,
            best_gradient=torch.zeros_like(x),
            best_loss=nothing,
            step=2 * _per_sample(epsilon, x),
            before=x,
            last_loss=-nothing,  # the first point is not a rise
            rises=torch.zeros_like(nothing),
            checked_loss=nothing,
            halved=torch.ones_like(nothing, dtype=torch.bool),
        )

    def observe(self, gradient: Tensor, loss: Tensor) -> None:
        self.rises = self.rises + (loss > self.last_loss)
        self.last_loss = loss
        super().observe(gradient, loss)

    def check(self, gradient: Tensor, enough: float) -> Tensor:
        """A checkpoint: halve the step and go back to the best point by condition 1 or 2; the gradient to go on from.

        Condition 1: not more than ``enough`` of the steps raised the loss (the paper: fewer than; where the number is whole,
        the reference code halves, and short runs are the better for it). Condition 2: neither was the step halved at the
        last checkpoint, nor the best loss raised since.
        """
        halve = (self.rises <= enough) | (~self.halved & (self.checked_loss == self.best_loss))
        self.step = _where(halve, self.step / 2, self.step)
        self.last_loss = torch.where(halve, self.best_loss, self.last_loss)
        self.halved, self.checked_loss, self.rises = halve, self.best_loss, torch.zeros_like(self.rises)
        return self.back_to_best(halve, gradient)

    def move(self, gradient: Tensor, ball: NormBall, x: Tensor, share: float) -> None:
        """Eqs. 3 and 4: the plain step, and ``share`` of it with the rest of the step before."""
        plain = ball.project(self.here + self.step * ball.steepest(gradient), x)
        mixed = plain if share == 1 else ball.project(self.here + share * (plain - self.here) + (1 - share) * (self.here - self.before), x)
        self.before, self.here = self.here, mixed


@dataclass(frozen=True)
class _HalvingAPGD(_APGD):
    """APGD by step halving, in a ball whose ``steepest`` step and projection say the rest.

    The start is a random member of the ball; the reference code scales its random direction to the border.
    """

    rho: float = 0.75  # a window in which not more than this share of the steps raised the loss halves the step

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.rho <= 1, self, "rho must be in [0, 1]", self.rho)

    def _climb(self, active: ActiveSet, generator: torch.Generator) -> None:
        ball, windows = self.threat.select(active.victim.rows), checkpoints(self.num_steps)
        path = _HalvingPath.start(ball.sample(active.x, generator), ball.budget)
        for step in range(self.num_steps):
            gradient, loss, logits = active.gradient(path.here, self.loss)
            stay = self._record(active, path.here, loss, logits)
            if stay is not None:
                if not len(active):
                    return
                path.select(stay)
                gradient, loss, ball = gradient[stay], loss[stay], ball.select(stay)
            path.observe(gradient, loss)
            if step in windows:
                gradient = path.check(gradient, self.rho * windows[step])
            path.move(gradient, ball, active.x, MOMENTUM if step else 1.0)
        self._record_last(active, path.here)


def checkpoints(num_steps: int) -> dict[int, int]:
    """The steps before which the step size is checked, each with the number of steps since the check before.

    For 100 steps these are the paper's w_j = ceil(p_j num_steps), p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    For other numbers we round the windows down, as the reference code does, not the w_j up: in short runs the later
    checks come closer together, and on an undefended ResNet-20 the loss reached in 40 steps was 1-2 % greater.
    """
    first, shrink, least = (max(share * num_steps // 100, 1) for share in (22, 3, 6))
    at, window, found = first, first, {}
    while at < num_steps:
        found[at] = window
        window = max(window - shrink, least)
        at += window
    return found


@dataclass(frozen=True)
class APGDAttack(_HalvingAPGD):
    """Auto-PGD in the Linf ball (Croce & Hein, ICML 2020, Algorithm 1).

    A sample costs at most ``num_steps`` forward and backward passes and one more forward for the last image. The first
    image that reaches the goal is returned, else the one of greatest loss, also in training.
    """

    epsilon: float = 8 / 255  # in [0,1] pixel units; a tensor [B] gives one budget per image

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)


@dataclass(frozen=True)
class APGDL2Attack(_HalvingAPGD):
    """Auto-PGD in the L2 ball: as APGDAttack, with steps along the normalised gradient."""

    epsilon: float = 0.5  # Euclidean length over all pixels and channels; a tensor [B] gives one budget per image

    @property
    def threat(self) -> L2Ball:
        return L2Ball(self.epsilon)


@dataclass
class _SparsePath(_Path):
    """Algorithm 1 of Croce & Hein (2021): the support of the best change sets how many values a step touches, and its size."""

    support: Tensor  # [B]: channel values that the best point changed, at the last check
    count: Tensor  # [B]: channel values in a step

    @classmethod
    def start(cls, x_adv: Tensor, x: Tensor, epsilon: float | Tensor, *, fresh: bool) -> "_SparsePath":
        """From a random point (``fresh``) a fifth of all values step; from a found one, as many as ``check`` says."""
        values = torch.full((len(x),), float(x[0].numel()), device=x.device)
        support = values if fresh else _support(x_adv, x)
        return cls(
            here=x_adv,
            best=x_adv,
            best_gradient=torch.zeros_like(x),
            best_loss=torch.full_like(values, -torch.inf),
            step=_per_sample(epsilon, x),
            support=support,
            count=0.2 * values if fresh else support / 1.5,
        )

    def check(self, gradient: Tensor, x: Tensor, epsilon: float | Tensor) -> Tensor:
        """Where the support shrank by over 5 %: full step, from the best point; else a smaller step. The gradient to go on from."""
        support, full = _support(self.best, x), _per_sample(epsilon, x)
        shrunk = support < 0.95 * self.support
        self.step = torch.minimum(torch.maximum(_where(shrunk, full, self.step / 1.5), full / 10), full)
        self.support, self.count = support, support / 1.5
        return self.back_to_best(shrunk, gradient)

    def move(self, gradient: Tensor, ball: NormBall, x: Tensor) -> None:
        self.here = ball.project(self.here + self.step * sparse_sign(gradient, self.count), x)


@dataclass(frozen=True)
class APGDL1Attack(_APGD):
    """Auto-PGD in the L1 ball (Croce & Hein, ICML 2021): sparse steps, with the exact projection onto ball and box.

    With ``widen`` (the default, and what AutoAttack does) 30 % of the steps search the ball of three times the radius
    and 30 % that of twice the radius first; only images of the true ball are recorded, so no sample leaves before.
    Costs ``num_steps`` forward and backward passes, and one forward at the end of each ball.
    """

    epsilon: float = 12.0  # sum of absolute changes over all pixels and channels; a tensor [B] gives one budget per image
    widen: bool = True

    @property
    def threat(self) -> L1Ball:
        return L1Ball(self.epsilon)

    def _climb(self, active: ActiveSet, generator: torch.Generator) -> None:
        noise = torch.randn(active.x.shape, generator=generator, device=active.x.device, dtype=active.x.dtype)
        start, fresh = active.x + noise, True
        for factor, num_steps in self.phases():
            start = self._search(active, factor, num_steps, start, fresh)
            fresh = False

    def phases(self) -> list[tuple[float, int]]:
        """The balls to search one after the other: radius in multiples of epsilon, steps."""
        wide = [(factor, int(share * self.num_steps)) for factor, share in WIDENING[:-1]] if self.widen else []
        rest = self.num_steps - sum(steps for _, steps in wide)
        return [(factor, steps) for factor, steps in [*wide, (1.0, rest)] if steps]

    def _search(self, active: ActiveSet, factor: float, num_steps: int, start: Tensor, fresh: bool) -> Tensor:
        """Search one ball; the best point found. Members of the true ball (``factor`` 1) are recorded."""
        ball, record = self.threat.select(active.victim.rows), factor == 1
        ball = ball.with_budget(factor * ball.budget)  # type: ignore[arg-type]
        path = _SparsePath.start(ball.project(start, active.x), active.x, ball.budget, fresh=fresh)
        every = max(int(0.04 * num_steps), 1)
        for step in range(num_steps):
            gradient, loss, logits = active.gradient(path.here, self.loss)
            stay = self._record(active, path.here, loss, logits) if record else None
            if stay is not None:
                if not len(active):
                    return path.best
                path.select(stay)
                gradient, loss, ball = gradient[stay], loss[stay], ball.select(stay)
            path.observe(gradient, loss)
            if step and step % every == 0:
                gradient = path.check(gradient, active.x, ball.budget)
            path.move(gradient, ball, active.x)
        if record:
            self._record_last(active, path.here)
        else:
            path.observe(path.best_gradient, active.query(path.here, self.loss)[0])  # only the point is used from here
        return path.best


def sparse_sign(gradient: Tensor, count: Tensor) -> Tensor:
    """The signs of the ``count`` [B] largest entries of the gradient [B,3,H,W], at least one, divided by their number."""
    flat = gradient.flatten(1)
    size = flat.abs()
    order = size.sort(1, descending=True).values
    least = order.gather(1, (count.ceil().long().clamp(1, flat.shape[1]) - 1).unsqueeze(1))
    signs = torch.where(size >= least, flat.sign(), 0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).reshape(gradient.shape)


@dataclass(frozen=True)
class _EveryTarget(_APGD):
    """One climb towards each of the likeliest wrong classes; a sample leaves at any misclassification.

    Classes are ranked by the clean logits, for one forward. With fewer than ``n_targets`` others, all are tried.
    A goal that is itself targeted is one climb towards its target. As the losses of different classes do not compare,
    the image returned of a sample that stands is the one of best margin.
    """

    loss: Loss = TARGETED_DLR
    n_targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_targets >= 1, self, "n_targets must be at least 1", self.n_targets)
        told = type(self.loss).__name__
        require(
            self.loss.tells_classes, self, "loss must depend on the class that is tried, as TargetedDLR does (see Loss.tells_classes)", told
        )

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        if goal.targeted:
            return super().perturb(victim, x, goal, generator)
        towards = Towards.likeliest(goal, victim.logits(x), self.n_targets)
        active = self.active(victim, x, towards)
        for rank in range(towards.order.shape[1]):
            active.goal = replace(active.goal, rank=rank)  # type: ignore[call-arg]  # a Towards, as given
            self._climb(active, generator)
            if not len(active):
                break
        return active.result()

    def _score(self, loss: Tensor, logits: Tensor, goal: Goal) -> Tensor:
        return MARGIN(logits, goal)


@dataclass(frozen=True)
class APGDTargetedAttack(_EveryTarget, APGDAttack):
    """APGD-T in the Linf ball (Croce & Hein, ICML 2020, section 5): targeted DLR towards nine classes in turn.

    Costs up to ``n_targets`` times what APGDAttack costs, and one forward.
    """

    epsilon: float = 8 / 255  # in [0,1] pixel units; a tensor [B] gives one budget per image


@dataclass(frozen=True)
class APGDTargetedL2Attack(_EveryTarget, APGDL2Attack):
    """APGD-T in the L2 ball."""

    epsilon: float = 0.5  # Euclidean length over all pixels and channels; a tensor [B] gives one budget per image


@dataclass(frozen=True)
class APGDTargetedL1Attack(_EveryTarget, APGDL1Attack):
    """APGD-T in the L1 ball; AutoAttack's L1 version tries five classes."""

    epsilon: float = 12.0  # sum of absolute changes over all pixels and channels; a tensor [B] gives one budget per image
    n_targets: int = 5


def _where(those: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Choose whole images by a mask [B]."""
    return torch.where(those.reshape(-1, 1, 1, 1), yes, no)


def _per_sample(value: float | Tensor, x: Tensor) -> Tensor:
    """A number, or one per sample [B], as [B,1,1,1]."""
    return torch.as_tensor(value, device=x.device, dtype=x.dtype).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)


def _support(x_adv: Tensor, x: Tensor) -> Tensor:
    """How many channel values differ, [B]."""
    return (x_adv != x).flatten(1).sum(1).float()
