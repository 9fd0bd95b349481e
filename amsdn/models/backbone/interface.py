"""What the rest of the model asks of a backbone: four feature maps, each half the size of the one before."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """normalised images [B,3,H,W] -> four maps [C2, C3, C4, C5], where level i is [B, channels[i], H/strides[i], W/strides[i]].

    Subclasses set ``channels`` and ``strides`` (pixels per cell, each twice the one before).
    """

    channels: list[int]
    strides: list[int]

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """The four maps, finest first."""
