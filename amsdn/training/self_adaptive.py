"""Self-adaptive training: labels that slowly follow what the model answers, kept for every training image.

Soft labels smooth the loss that adversarial training sees; Fast-LS-l0 needs them against overfitting to one-step attacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.errors import InputError


@dataclass(frozen=True)
class SelfAdaptiveLabels:
    """Algorithm 1 of Huang, Zhang & Zhang (NeurIPS 2020): t_i <- momentum t_i + (1 - momentum) p_i, from a share of the run on.

    The loss of a step takes the labels that its own answers have already moved, and weighs image i by w_i = max_j t_ij, divided
    by the sum of weights. p_i is the answer to the clean, augmented image in train mode, as in the authors' code for adversarial
    training (their TRADES variant). Where only the attacked version of an image is shown its label stays: a fooled answer says
    nothing about the image.

    The paper starts at a fixed epoch, Fast-LS-l0 at half of the epochs. Whether Fast-LS-l0 keeps the weights could not be
    checked; they are the paper's part of the method, so we do. ``start`` of 1 switches it off.
    """

    start: float = 1.0  # share of the run
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1 or not 0 <= self.momentum < 1:
            raise InputError(f"labels: start must lie in [0, 1] and momentum in [0, 1), got {self.start} and {self.momentum}")


@dataclass(frozen=True)
class Targets:
    """The labels of a part's images: of which images of the split, soft [B,K] float32, and with which momentum they move."""

    index: Tensor  # [B] int64
    soft: Tensor  # [B,K], rows sum to 1
    momentum: float = 1.0  # 1: they stay as they are, and nothing is to be remembered

    def following(self, logits: Tensor, first: int) -> "Targets":
        """The same with those of the images from number ``first`` on moved towards the answers ``logits`` [B - first,K]."""
        assert len(logits) == len(self.soft) - first, f"{len(logits)} answers for images {first} to {len(self.soft)}"
        if self.momentum == 1:
            return self
        moved = self.momentum * self.soft[first:] + (1 - self.momentum) * logits.detach().float().softmax(1)
        return replace(self, soft=torch.cat([self.soft[:first], moved]))

    def cross_entropy(self, logits: Tensor, first: int, label_smoothing: float) -> Tensor:
        """What ``logits`` [n,K] cost as answers to the images from number ``first`` on, [n]."""
        return F.cross_entropy(logits.float(), self.soft[first : first + len(logits)], label_smoothing=label_smoothing, reduction="none")

    def mean(self, costs: Tensor, first: int) -> Tensor:
        """The mean of costs [n] of the images from number ``first`` on, weighed by how sure their labels are."""
        weight = self.soft[first : first + len(costs)].amax(1)
        return (weight * costs).sum() / weight.sum()

    def memory(self) -> dict[str, Tensor]:
        """What is to be remembered of these labels."""
        return {} if self.momentum == 1 else {"index": self.index, "soft_labels": self.soft}


class LabelMemory:
    """The soft labels of all training images: [images,K] float32 once learning them has begun, 4 bytes a label."""

    def __init__(self, config: SelfAdaptiveLabels, images: int | None = None) -> None:
        """``images`` is the size of the training split; raises InputError where it is needed and not given."""
        if config.start < 1 and images is None:
            raise InputError("labels: learning them needs the number of training images; give it to the stage, or set start to 1")
        self.config, self.images = config, images
        self.table: Tensor | None = None  # rows of zeros belong to images that have not been met since the start

    def recall(self, index: Tensor, y: Tensor, classes: int, progress: float) -> Targets:
        """The labels of the images ``index`` [B] of the split, whose given labels are y [B], on y's device."""
        index = index.to(y.device)
        soft = torch.zeros(len(y), classes, device=y.device).scatter_(1, y.unsqueeze(1), 1.0)
        if self.table is not None:
            found = self.table.to(y.device)[index]
            soft = torch.where(found.sum(1, keepdim=True) > 0, found, soft)
        return Targets(index, soft, self.config.momentum if progress >= self.config.start else 1.0)

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        """Take in the labels of all parts of a step."""
        for memory in memories:
            if "soft_labels" in memory:
                soft = memory["soft_labels"]
                if self.table is None:
                    assert self.images is not None
                    self.table = soft.new_zeros(self.images, soft.shape[1])
                self.table = self.table.to(soft.device).index_copy_(0, memory["index"].to(soft.device), soft)

    def state(self) -> dict[str, Any]:
        """The labels, or nothing where none have been learnt."""
        return {} if self.table is None else {"table": self.table}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self.table = state.get("table")
