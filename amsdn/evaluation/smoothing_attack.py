"""Attacks on what smoothing certified: the smoothed classifier, attacked inside the certified ball and asked again there.

A certificate of the smoothed classifier says nothing about the base classifier that other attacks are run against, so their
rows cannot contradict it; these can.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from amsdn.attacks.adaptive import frozen
from amsdn.attacks.base import Attack
from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN
from amsdn.evaluation.crosscheck import Checked, Violation, claim_of
from amsdn.evaluation.run_folder import Samples
from amsdn.evaluation.smoothing import SmoothedClassifier
from amsdn.protocols import check_eval_mode, device_of, is_black_box, surrogate_of
from amsdn.records import CertRecord
from amsdn.threats import L2Ball
from amsdn.utils.helpers import generator

SMOOTHED_PGD = "smoothed-pgd"
INSIDE = 1 - 1e-4  # attacks stay this share of the radius inside the ball, so that rounding cannot put them outside


@dataclass(frozen=True)
class RecheckConfig:
    """How hard certified samples are attacked, and how sure a contradiction must be."""

    steps: int = 20  # of PGD on the smoothed classifier
    draws: int = 16  # noise samples per step
    n: int = 1000  # noise samples of each new prediction
    alpha: float = 1e-6  # probability that one new prediction is wrong and not an abstention
    batch_size: int = 16  # samples attacked together, each with all its draws
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.draws, self.n, self.batch_size) < 1 or not 0 < self.alpha < 1:
            raise InputError(f"recheck: counts must be at least 1 and alpha between 0 and 1, got {self}")


@dataclass(frozen=True)
class Check:
    """One image inside a certified ball and what the smoothed classifier said there (-1: abstained, which contradicts nothing)."""

    sample_id: int
    attack: str
    radius: float
    spent: float
    certified_prediction: int
    prediction: int

    @property
    def violated(self) -> bool:
        return self.prediction not in (ABSTAIN, self.certified_prediction)


def recheck_smoothed(
    smoothed: SmoothedClassifier,
    split: Samples,
    certificates: Iterable[CertRecord],
    attacks: Mapping[str, Attack] | None = None,
    config: RecheckConfig | None = None,
    *,
    progress: bool = True,
) -> list[Check]:
    """Attack every certified sample inside its ball and ask the smoothed classifier again there.

    Two kinds of image are tried per sample. ``smoothed-pgd`` follows the smoothed classifier's own gradient (SmoothAdv,
    Salman et al. 2019), where the model has any. Each of ``attacks`` (l2) is run on the base classifier against the certified prediction, and the
    direction it finds is followed to the radius: attacks stop just behind the base classifier's boundary, elsewhere than here.

    False alarms: a new prediction errs with probability at most ``config.alpha`` (Cohen 2019, Proposition 1), and each certificate
    was itself wrong with probability at most its alpha; ``false_alarm_bound`` adds these up. Raises InputError where an
    attack is not an l2 attack or its name is taken.
    """
    config, attacks = config or RecheckConfig(), attacks or {}
    check_eval_mode(smoothed.model, "recheck_smoothed")
    for name, attack in attacks.items():
        if name == SMOOTHED_PGD or attack.threat.family != "l2":
            raise InputError(f"recheck: {name!r} must be an l2 attack not named {SMOOTHED_PGD!r}; leave it out")
    claims = [c for c in certificates if claim_of(c).smoothed and c.prediction != ABSTAIN and c.radius > 0]
    checks: list[Check] = []
    with tqdm(total=len(claims), desc="cross-check l2", unit="image", disable=not progress) as bar:
        for start in range(0, len(claims), config.batch_size):
            chunk = claims[start : start + config.batch_size]
            checks += _recheck_chunk(smoothed, split, chunk, attacks, config)
            bar.update(len(chunk))
    return checks


def smoothed_pgd(
    smoothed: SmoothedClassifier, x: Tensor, label: Tensor, radius: Tensor, generator: torch.Generator, *, steps: int = 20, draws: int = 16
) -> Tensor:
    """Lower the smoothed probability of ``label`` [B] within l2 ``radius`` [B] of x [B,3,H,W] -> [B,3,H,W].

    Projected gradient steps of twice the radius over ``steps`` on the log of the mean probability over fresh noise
    (Salman et al. 2019, eq. 6).
    """
    ball = L2Ball(radius)
    length = (2 * radius / steps).reshape(-1, 1, 1, 1)
    x_adv = x  # no random start: the noise already keeps the gradient from vanishing at x
    differentiable = surrogate_of(smoothed.model) or smoothed.model
    with frozen(smoothed.model, differentiable), torch.enable_grad():
        for _ in range(steps):
            leaf = x_adv.detach().requires_grad_(True)
            noise = torch.randn((draws, *x.shape), generator=generator, device=x.device)
            logits = differentiable((leaf + smoothed.sigma * noise).flatten(0, 1)).float()
            log_p = logits.log_softmax(1).unflatten(0, (draws, len(x)))[:, torch.arange(len(x), device=x.device), label]  # [draws,B]
            (gradient,) = torch.autograd.grad(log_p.logsumexp(0).sum(), leaf)
            x_adv = ball.project(leaf.detach() - length * ball.steepest(gradient), x)
    return x_adv


def false_alarm_bound(checks: Sequence[Check], certificate_alpha: float, recheck_alpha: float) -> float:
    """The most that the probability of any violation can be if the code is sound, by the union bound."""
    certificates = len({check.sample_id for check in checks})
    return min(1.0, certificates * certificate_alpha + len(checks) * recheck_alpha)


def checked(checks: Sequence[Check], certificate_alpha: float, recheck_alpha: float) -> Checked:
    """The outcome of ``recheck_smoothed`` in the form that ``conclude`` takes."""
    return Checked(
        certificate="l2",
        samples=len({check.sample_id for check in checks}),
        checks=len(checks),
        abstained=sum(check.prediction == ABSTAIN for check in checks),
        false_alarm_bound=false_alarm_bound(checks, certificate_alpha, recheck_alpha),
        found=tuple(
            Violation(c.sample_id, "l2", c.radius, c.certified_prediction, c.attack, c.spent, c.prediction) for c in checks if c.violated
        ),
        rows=tuple(asdict(check) for check in checks),
    )


def _recheck_chunk(
    smoothed: SmoothedClassifier, split: Samples, claims: Sequence[CertRecord], attacks: Mapping[str, Attack], config: RecheckConfig
) -> list[Check]:
    device = device_of(smoothed.model)
    x = split.fetch(torch.tensor([c.sample_id for c in claims]))[0].to(device)
    label = torch.tensor([c.prediction for c in claims], device=device)
    radius = torch.tensor([c.radius * INSIDE for c in claims], device=device)
    first = claims[0].sample_id
    candidates = {}
    if not is_black_box(smoothed.model):
        draw = generator(device, "recheck", config.seed, SMOOTHED_PGD, first)
        candidates[SMOOTHED_PGD] = smoothed_pgd(smoothed, x, label, radius, draw, steps=config.steps, draws=config.draws)
    for name, attack in attacks.items():
        found = attack.craft(smoothed.model, x, label, generator(device, "recheck", config.seed, name, first))
        ball = L2Ball(radius)
        candidates[name] = ball.project(x + ball.steepest(found - x) * radius.reshape(-1, 1, 1, 1), x)
    checks = []
    for name, x_adv in candidates.items():
        spent = (x_adv.double() - x.double()).flatten(1).norm(dim=1).tolist()
        for i, c in enumerate(claims):
            assert spent[i] <= c.radius, f"sample {c.sample_id}: {name} left the certified ball, {spent[i]} > {c.radius}"
            draw = generator(device, "recheck", config.seed, name, "predict", c.sample_id)
            answer = smoothed.predict(x_adv[i], draw, n=config.n, alpha=config.alpha)
            checks.append(Check(c.sample_id, name, c.radius, spent[i], c.prediction, answer))
    return checks
