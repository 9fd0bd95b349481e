"""Exponential moving average of weights, with warm-up."""

import copy

import torch
from torch import nn


class EMA:
    """A shadow of ``model`` whose weights follow it with decay min(decay, (1+t)/(10+t)) at update t.

    The warm-up keeps the first averages from being dominated by the random initial weights. Floating
    buffers (batch-norm statistics) are averaged like weights; whole-number buffers are copied.
    The shadow is in eval mode and takes no gradients, so that it can serve as a teacher. Processes that train together
    hold the same weights, so each keeps the average by itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_now(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        # One call for all: on a GPU a few kernels instead of one for each tensor (torch.optim.swa_utils does the same).
        torch._foreach_lerp_([mine for mine, _ in floating], [theirs for _, theirs in floating], 1 - self.decay_now())
        for mine, theirs in pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)
        self.updates += 1
