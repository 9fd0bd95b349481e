"""What an evaluation will cost before it starts: planned passes of every attack times what a pass of this model takes here.

The plan is for images that resist everything; each image that falls early costs less, so it is an upper bound. How many passes an attack plans is not
written down anywhere: it is counted, by running it once against a model that no image makes err.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from amsdn.attacks.base import Attack, Victim
from amsdn.attacks.losses import CROSS_ENTROPY, Goal
from amsdn.evaluation.outcome import check_answers
from amsdn.evaluation.run_folder import Samples
from amsdn.protocols import Classifier, check_eval_mode, device_of, is_black_box, is_stochastic

REPEATS = 3


class Unshakable(nn.Module):
    """Says class 0 of whatever it sees, and gives attacks something to climb all the same; its detector never raises an alarm."""

    detection_threshold = 0.5

    def __init__(self, classes: int, *, stochastic: bool = False) -> None:
        super().__init__()
        self.classes, self.stochastic = classes, stochastic

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,K]."""
        brightness = x.mean((1, 2, 3)).unsqueeze(1)
        rungs = torch.linspace(0, -1, self.classes - 1, device=x.device)
        return torch.cat([10 - brightness, brightness + rungs], 1)

    def analyze(self, x: Tensor) -> "Unalarmed":
        """The same logits, and an anomaly score that a detector-evading attack can follow."""
        return Unalarmed(self(x), 0.1 * x.mean((1, 2, 3)), torch.zeros(len(x), dtype=torch.bool, device=x.device), 0.1 * x[:, :1])


@dataclass(frozen=True)
class Unalarmed:
    """An ``Analysis`` in which nothing is the matter."""

    logits: Tensor  # [B,K]
    anomaly_score: Tensor  # [B]
    detected: Tensor  # [B]
    anomaly_map: Tensor  # [B,1,H,W]


@dataclass(frozen=True)
class Passes:
    """Passes of the network for one image: a number of each, or the seconds of each."""

    forward: float
    backward: float


def planned_passes(attack: Attack, shape: tuple[int, int], classes: int, *, stochastic: bool = False) -> Passes:
    """What ``attack`` spends on an image of this height and width that resists all of it; for a random model, draws included."""
    x, y = torch.full((1, 3, *shape), 0.5), torch.zeros(1, dtype=torch.int64)
    result = attack(Unshakable(classes, stochastic=stochastic).eval(), x, y, generator=torch.Generator().manual_seed(0))
    return Passes(float(result.forwards), float(result.backwards))


def pass_seconds(model: Classifier, x: Tensor, y: Tensor) -> Passes:
    """Seconds an image of a forward pass, and of what a backward pass adds to it, on images [B,3,H,W] with labels y [B]; medians.

    A black box has no backward pass.
    """
    goal = Goal(y)
    victim = Victim.of(model, len(x), x.device)

    def forward() -> object:
        return victim.logits(x)

    def both() -> object:
        return victim.gradient(x, lambda logits: CROSS_ENTROPY(logits, goal))

    seconds = []
    for work in (forward,) if is_black_box(model) else (forward, both):
        work()  # the first call allocates
        seconds.append(median(_timed(work, x.device) for _ in range(REPEATS)) / len(x))
    return Passes(seconds[0], max(seconds[-1] - seconds[0], 0.0))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def planned_seconds(model: nn.Module, split: Samples, attacks: Mapping[str, Attack], batch_size: int) -> dict[str, float]:
    """By attack, the seconds that an image costs which resists all of it. Raises InputError for a model that cannot be evaluated."""
    check_eval_mode(model, "evaluate")
    x, y = (t.to(device_of(model)) for t in split.fetch(torch.arange(min(batch_size, len(split)))))
    classes = check_answers(model, x)
    price = pass_seconds(model, x, y)
    shape = (x.shape[2], x.shape[3])
    plans = {name: planned_passes(attack, shape, classes, stochastic=is_stochastic(model)) for name, attack in attacks.items()}
    return {name: plan.forward * price.forward + plan.backward * price.backward for name, plan in plans.items()}
