"""What a training stage is to the loop: a step that turns a part of a batch into a loss, and what it remembers.

A step's batch may be computed in several parts, in one process or in many, one part after the other or at once. A stage sees
one part at a time and must not change while it does; what it learns about itself it hands over as the output's ``memory``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Batch:
    """One part's input: images [B,3,H,W] with their labels [B], and the part's own randomness."""

    x: Tensor
    y: Tensor
    index: Tensor  # int64 [B]: the place of each image in the training split
    generator: torch.Generator  # on the device; another one in every part
    host: torch.Generator  # on the CPU, for choices that the host must know, such as which attack; the same in all parts of a step
    progress: float  # share of the run that is done, [0,1)


@dataclass
class StepOutput:
    """A scalar loss to descend, numbers [] to log (detached tensors), and what the stage is to remember of the part.

    ``memory`` has the same keys and types for every part of a step, and for parts of equal size the same shapes;
    ``Stage.remember`` gets it back when the step is done. ``after_backward`` is called once the part's gradients are there, and
    also when computing them failed: adversarial weight perturbation puts the weights back.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    memory: dict[str, Tensor] = field(default_factory=dict)
    after_backward: Callable[[], None] | None = None


class Stage(ABC):
    """What a training stage adds to the loop."""

    name: str

    @abstractmethod
    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        """The loss of one part of a batch. ``model`` is in train mode; ``teacher`` is its average, in eval mode.

        It must not change the stage, and where it raises (memory may run out anywhere) it must leave the weights as they were:
        the part is then computed again, in smaller parts. Whatever is drawn from ``batch.host`` decides alike for all parts of a
        step, so that no process waits for one with a costlier attack. On CUDA it should never wait for the device.
        """

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        """Take in what the parts of the finished step gave to remember, in order; the same in every process."""
        assert not any(memories), f"stage {self.name} was given memories that it does not take: {memories}"

    def extra_modules(self) -> nn.ModuleDict:
        """Modules trained along with the model and thrown away afterwards."""
        return nn.ModuleDict()

    def state(self) -> dict[str, Any]:
        """What the stage remembers from step to step, as tensors and plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        assert not state, f"stage {self.name} does not remember {list(state)}"
