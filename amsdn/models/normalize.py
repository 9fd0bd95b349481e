"""Input normalisation as a layer, so that a classifier's inputs are always images in [0,1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amsdn.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """images [B,3,H,W] in [0,1] -> (x - mean) / std, the same shape.

    ``mean`` and ``std`` hold one value per channel, in [0,1] pixel units. Raises InputError unless there are
    three of each and every ``std`` is positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise InputError(f"Normalize: needs three means and three positive stds, got mean={tuple(mean)} std={tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
