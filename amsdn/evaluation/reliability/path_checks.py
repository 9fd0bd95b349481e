"""What an attack does on its way: is it still gaining when its steps are used up, and does it return the best that it saw?

The attack runs twice more on a few images: as it is, for what it returns, and without leaving the images that are fooled, on a model that keeps what it
answered, for the way there.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from amsdn.attacks.base import Attack, Victim
from amsdn.attacks.losses import margin
from amsdn.evaluation.reliability.finding import Finding
from amsdn.evaluation.reliability.result_checks import transfers
from amsdn.protocols import Classifier, is_stochastic, surrogate_of

LAST = 10  # calls at the end of the path
STILL_GAINING = 0.05  # of what was gained on the whole path, per cent of which the last calls may add
LOST = 0.05  # of images that may be fooled on the way and returned unfooled: the two runs draw differently


@dataclass
class Log:
    """Margins of the true labels [N], one tensor for each call on all N images, in order."""

    labels: Tensor
    margins: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor) -> None:
        """Keep what a call on all images answered; calls on some of them are an attack's own business."""
        if len(logits) == len(self.labels):
            self.margins.append(margin(logits.detach().float(), self.labels))


class Recorder(nn.Module):
    """The model, answering as ever, with a log of what it answered; so is its surrogate, if it declares one."""

    def __init__(self, model: Classifier, log: Log) -> None:
        super().__init__()
        self.model, self.log = model, log
        self.stochastic = is_stochastic(model)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.log.add(logits)
        return logits

    def differentiable_surrogate(self) -> "Recorder | None":
        """The model's own surrogate, recorded alike."""
        surrogate: Any = surrogate_of(self.model) if isinstance(self.model, nn.Module) else None
        if surrogate is None:
            return None
        recorder = Recorder(surrogate, self.log)
        recorder.matches_forward = bool(getattr(surrogate, "matches_forward", False))  # type: ignore[assignment]
        return recorder


def path_findings(model: Classifier, attack: Attack, x: Tensor, y: Tensor, generator: torch.Generator) -> list[Finding]:
    """Both checks of this module, for ``attack`` on images [N,3,H,W] with labels y [N]."""
    log, state = Log(y), generator.get_state()
    replace(attack, stop_when_fooled=False)(Recorder(model, log).eval(), x, y, generator=generator)
    path = torch.stack(log.margins)  # [calls,N]
    generator.set_state(state)
    return [has_settled(path), keeps_success(path, attack(model, x, y, generator=generator).prediction != y)]


def transfer_finding(model: Classifier, attack: Attack, x: Tensor, y: Tensor, generator: torch.Generator) -> Finding | None:
    """Whether what fools the model's own surrogate, attacked by itself, fools the model; None where it declares no surrogate."""
    surrogate = surrogate_of(model) if isinstance(model, nn.Module) else None
    if surrogate is None:
        return None
    surrogate = surrogate.eval()
    victims = Victim.of(surrogate, len(x), x.device), Victim.of(model, len(x), x.device)
    right = torch.stack([victim.rescore(x)[0].argmax(1) == y for victim in victims]).all(0)
    x_adv = attack(surrogate, x, y, generator=generator).x_adv
    on_surrogate, on_model = (right & (victim.rescore(x_adv)[0].argmax(1) != y) for victim in victims)
    return transfers(on_surrogate, on_model)


def has_settled(path: Tensor) -> Finding:
    """On images that stand to the end, the best margin so far [calls,N] hardly falls any more over the last calls."""
    best = path.cummin(0).values
    stands = best[-1] > 0
    if len(path) <= 2 * LAST or not bool(stands.any()):
        return Finding("has settled", True, 0.0, STILL_GAINING, "nothing stands, or the path is too short to tell")
    gained = (best[0] - best[-1])[stands].mean()
    late = float((best[-1 - LAST] - best[-1])[stands].mean() / gained.clamp_min(torch.finfo(path.dtype).tiny))
    told = f"the last {LAST} of {len(path)} calls bring {100 * late:.0f} % of all that was gained: the attack needs more steps"
    return Finding("has settled", late <= STILL_GAINING, late, STILL_GAINING, told)


def keeps_success(path: Tensor, fooled: Tensor) -> Finding:
    """An image that was fooled anywhere on the path [calls,N] is returned fooled [N]."""
    lost = float(((path < 0).any(0) & ~fooled).float().mean())
    told = f"{100 * lost:.1f} % of images were fooled on the way and are returned unfooled: the attack forgets its best"
    return Finding("keeps success", lost <= LOST, lost, LOST, told)
