"""The binarization test (Zimmermann, Brendel, Tramer & Carlini, NeurIPS 2022): can the attack find what is surely there?

For every image a new task is made of the defence's own answers: points well inside the threat model against one point at its border. A linear
classifier on the logits tells them apart, so an adversarial example, the border point, exists by construction. The attack, unchanged, starts from the
clean image and must find one. An attack that fails here would also miss what is there on the real task, so its robust accuracy means nothing.

Deviations: logits in place of the penultimate layer's features, so that any classifier can be tested; as they are few, the border point is the outermost of
``tries``. The classifier is Fisher's discriminant with a threshold near the border point, the paper's being logistic regression. An image whose border point cannot
be told from the inner ones, or for which other random points of the threat model do as well, has no say.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amsdn.attacks.base import Attack
from amsdn.evaluation.reliability.finding import Finding
from amsdn.protocols import Classifier, is_stochastic, surrogate_of
from amsdn.threats import ThreatModel

ENOUGH = 0.95  # of the images that have a say: what the attack must break (the paper's threshold)
READABLE = 4.0  # how far apart the new logits of inner and border points are
INNER = 0.3  # how far towards the border inner points lie at most


@dataclass(frozen=True)
class Binarization:
    """How the test is made: inner points of each image, candidates for its border point, and as many random points that must not suffice."""

    inner: int = 199
    tries: int = 50
    closeness: float = 0.1  # how far from the border point, towards the inner points, the threshold lies


DEFAULT = Binarization()


class Binarized(nn.Module):
    """A model's logits [B,K], read by one linear classifier: [B,2], of which class 1 is what the attack looks for.

    Random, or in need of a surrogate, exactly as the model is.
    """

    def __init__(self, model: Classifier, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.model, self.weight, self.bias = model, weight, bias  # [K] and []
        self.stochastic = is_stochastic(model)

    def forward(self, x: Tensor) -> Tensor:
        score = self.model(x).float() @ self.weight + self.bias
        return torch.stack([-score, score], 1)

    def differentiable_surrogate(self) -> "Binarized | None":
        """The same reading of the model's own surrogate."""
        surrogate = surrogate_of(self.model) if isinstance(self.model, nn.Module) else None
        if surrogate is None:
            return None
        reading = Binarized(surrogate, self.weight, self.bias)
        reading.matches_forward = bool(getattr(surrogate, "matches_forward", False))  # type: ignore[assignment]
        return reading


def binarized(model: Classifier, x: Tensor, threat: ThreatModel, settings: Binarization, generator: torch.Generator) -> Binarized | None:
    """The new task of one image x [1,3,H,W]; None where no border point can be told from the inner points, or random points solve it."""
    inside = threat.sample(x.expand(settings.inner, -1, -1, -1), generator)
    depth = INNER * torch.rand(settings.inner, 1, 1, 1, generator=generator, device=x.device)
    with torch.no_grad():
        inner = model(torch.cat([x, x + depth * (inside - x)])).float()
        border = model(threat.sample(x.expand(settings.tries, -1, -1, -1), generator)).float()
        weight, bias = _between(inner, border, settings.closeness)
        guesses = model(threat.sample(x.expand(settings.tries, -1, -1, -1), generator)).float() @ weight + bias
    solvable = (border @ weight + bias).amax() > 0
    return Binarized(model, weight, bias).eval() if bool(solvable) and not bool((guesses > 0).any()) else None


def _between(inner: Tensor, border: Tensor, closeness: float) -> tuple[Tensor, Tensor]:
    """Weight [K] and bias [] of Fisher's discriminant of inner points [M,K] against the outermost of border points [T,K].

    The answer is below 0 for all inner points; it is above for that border point, unless it cannot be told from them.
    """
    centre = inner.mean(0)
    spread = (inner - centre).T @ (inner - centre) / len(inner)
    ridge = 1e-3 * spread.diagonal().mean().clamp_min(1e-12) * torch.eye(len(spread), device=spread.device)
    directions = torch.linalg.solve(spread + ridge, (border - centre).T)  # [K,T]
    outermost = ((border - centre) * directions.T).sum(1).argmax()  # by Mahalanobis distance
    weight = directions[:, outermost]
    most = (inner @ weight).max()
    gap = border[outermost] @ weight - most
    scale = READABLE / gap.abs().clamp_min(torch.finfo(gap.dtype).tiny)  # logits of common size: no loss saturates on them
    return scale * weight, -scale * (most + (1 - closeness) * gap)


def binarization_test(
    model: Classifier, x: Tensor, attack: Attack, generator: torch.Generator, settings: Binarization = DEFAULT
) -> Finding:
    """Whether ``attack`` finds the adversarial examples that were put into the threat models around images x [N,3,H,W]."""
    asked = found = 0
    for image in x.split(1):
        task = binarized(model, image, attack.threat, settings, generator)
        if task is not None:
            asked += 1
            found += bool(attack(task, image, torch.zeros(1, dtype=torch.int64, device=x.device), generator=generator).success)
    share = found / asked if asked else 1.0
    told = (
        f"the attack finds {found} of {asked} adversarial examples that exist by construction (binarization test): it misses what is there"
    )
    return Finding("binarization", share >= ENOUGH or asked - found <= 1, share, ENOUGH, told)
