"""What gradients go through where the answer itself has none: the mean over one-mask views of a defence by double masking."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amsdn.protocols import surrogate_of
from amsdn.utils.masking import masked_views

if TYPE_CHECKING:
    from amsdn.models.double_masking import DoubleMasking


class MaskAverage(nn.Module):
    """images [B,3,H,W] -> log of the mean probability over the one-mask views [B,K]: differentiable, with flat memory.

    It agrees with double masking where the one-mask predictions are unanimous, and mostly elsewhere. Passes that are not the
    only one are computed again in the backward pass instead of being kept.
    """

    def __init__(self, defence: "DoubleMasking") -> None:
        super().__init__()
        self.defence = defence
        self.through = surrogate_of(defence.classifier) or defence.classifier
        self.train(defence.training)

    def forward(self, x: Tensor) -> Tensor:
        masks = self.defence.masks(*x.shape[2:])
        own = torch.arange(len(masks), device=x.device).repeat(len(x)).split(self.defence.views_per_pass)
        rows = torch.arange(len(x), device=x.device).repeat_interleave(len(masks)).split(self.defence.views_per_pass)

        def look(x: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
            return self.through(masked_views(x[rows], masks, mask, mask, self.defence.fill)).float()

        if len(rows) == 1 or not torch.is_grad_enabled():
            logits = [look(x, r, i) for r, i in zip(rows, own, strict=True)]
        else:
            logits = [checkpoint(look, x, r, i, use_reentrant=False) for r, i in zip(rows, own, strict=True)]
        return mean_log_probability(torch.cat(logits).reshape(len(x), len(masks), -1))


def mean_log_probability(logits: Tensor) -> Tensor:
    """logits [B,M,K] -> log of the mean over M of the class probabilities, [B,K]; small ones keep their precision."""
    return logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])
