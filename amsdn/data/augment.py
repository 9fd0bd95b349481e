"""Label-preserving random changes of a whole batch at once, on its device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.errors import InputError


@dataclass(frozen=True)
class Augment:
    """Random horizontal flip, crop-shift with reflected borders, and square cutout, drawn afresh for each image.

    A flip of a digit or of text is another symbol: turn ``flip`` off there.
    """

    flip: bool = True  # mirror left and right with probability 1/2
    shift: int = 4  # move by up to this many pixels each way; at most the image's side minus one
    cutout: int = 0  # side in pixels of a square set to the image's mean colour; 0 for none

    def __post_init__(self) -> None:
        for name in ("shift", "cutout"):
            if getattr(self, name) < 0:
                raise InputError(f"Augment({name}) is a number of pixels and must be 0 or more, got {getattr(self, name)}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images [B,3,H,W] -> changed images [B,3,H,W]. Draws come from ``generator``, which may live on another device."""
        height, width = x.shape[2:]
        rows = _shifted(len(x), height, self.shift, generator).to(x.device)
        columns = _shifted(len(x), width, self.shift, generator).to(x.device)
        if self.flip:
            mirror = torch.rand(len(x), 1, generator=generator, device=generator.device).to(x.device) < 0.5
            columns = torch.where(mirror, columns.flip(1), columns)
        image = torch.arange(len(x), device=x.device)[:, None, None, None]
        channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        moved = x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
        return self._cut(moved, generator) if self.cutout else moved

    def _cut(self, x: Tensor, generator: torch.Generator) -> Tensor:
        inside = [_interval(len(x), side, self.cutout, generator).to(x.device) for side in x.shape[2:]]
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return torch.where(hole, x.mean(dim=(2, 3), keepdim=True), x)


def _shifted(count: int, side: int, shift: int, generator: torch.Generator) -> Tensor:
    """Source positions [count, side] of a line moved by a uniform whole number in [-shift, shift], mirrored at both ends."""
    most = min(shift, side - 1)
    offset = torch.randint(-most, most + 1, (count, 1), generator=generator, device=generator.device)
    position = (torch.arange(side, device=generator.device) + offset).abs()
    return side - 1 - (side - 1 - position).abs()


def _interval(count: int, side: int, length: int, generator: torch.Generator) -> Tensor:
    """Masks bool [count, side], each true on one interval of ``length`` (or the whole side) at a uniform place inside."""
    length = min(length, side)
    start = torch.randint(0, side - length + 1, (count, 1), generator=generator, device=generator.device)
    position = torch.arange(side, device=generator.device)
    return (position >= start) & (position < start + length)
