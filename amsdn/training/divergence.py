"""Noticing that a loss or gradient stopped being finite, without making a GPU wait at every step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.training.ranks import Ranks


class TrainingDiverged(RuntimeError):
    """A loss or gradient stopped being finite."""


@dataclass(frozen=True)
class _Seen:
    step: int
    loss: Tensor
    norm: Tensor
    metrics: dict[str, Tensor]


class FiniteWatch:
    """Keeps what recent steps came to, on the device, until somebody can afford to look."""

    def __init__(self, name: str, total: int, ranks: Ranks) -> None:
        self.name, self.total, self.ranks = name, total, ranks
        self.unchecked: list[_Seen] = []

    def note(self, step: int, loss: Tensor, norm: Tensor, metrics: dict[str, Tensor]) -> None:
        """Step number ``step`` (from 1) came to a loss [] and gradient norm [], the same in every process, and these metrics here."""
        self.unchecked.append(_Seen(step, loss, norm, metrics))

    def check(self) -> None:
        """Wait for the device once; raises TrainingDiverged, naming the first step and what was not finite in it."""
        if not self.unchecked:
            return
        finite = torch.stack([seen.loss + seen.norm for seen in self.unchecked]).isfinite()
        if not bool(finite.all()):
            raise TrainingDiverged(self._message(self.unchecked[finite.tolist().index(False)]))
        self.unchecked.clear()

    def _message(self, seen: _Seen) -> str:
        here = [name for name, value in seen.metrics.items() if not math.isfinite(float(value))]
        culprits = list(dict.fromkeys(name for names in self.ranks.gather(here) for name in names))
        loss = float(seen.loss)
        if not culprits:
            culprits = ["the gradient"] if math.isfinite(loss) else ["the loss"]
        return (
            f"{self.name}: not finite at step {seen.step} of {self.total}: {', '.join(culprits)} "
            f"(loss {loss:g}, gradient norm {float(seen.norm):g}); lower the learning rate or turn mixed precision off, with another --out"
        )
