"""Samples by index: what training and evaluation know of a data set.

A split hands out batches for a tensor of indices, on its own device. Small sets live there whole, as uint8;
folders decode their files on demand. Order is part of a split: a sample's index names it in every record.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.data.sampling import balanced_first
from amsdn.errors import InputError

RESIZE_CHUNK = 256  # images in float at once while a set is resized


class Split(ABC):
    """An ordered set of labelled images."""

    labels: Tensor
    """int64 [N], on the split's device."""

    @abstractmethod
    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """indices int64 [B] on any device -> images float32 [B,3,H,W] in [0,1], labels int64 [B], on the split's device."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "Split":
        """The same samples, handed out on ``device``."""

    @property
    def decodes(self) -> bool:
        """Whether every fetch reads and decodes files. Training then has them decoded ahead of time, one by one by ``decode``."""
        return False

    def decode(self, index: int) -> Tensor:
        """Image number ``index`` as ``fetch`` gives it, float32 [3,H,W], but on the CPU; in any thread. Only where ``decodes``."""
        raise NotImplementedError(f"{type(self).__name__} holds its images; fetch them")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where ``fetch`` puts its tensors."""
        return self.labels.device

    def subset(self, indices: Tensor) -> "Split":
        """The samples at ``indices`` [M] in that order, without copying images."""
        return SubsetSplit(self, indices)

    def gather(self, indices: Tensor, device: torch.device | str) -> "Split":
        """The samples at ``indices`` alone on ``device``; a split that holds its images moves no others there."""
        return SubsetSplit(self.to(device), indices)


class ArraySplit(Split):
    """All images in one uint8 tensor [N,3,H,W] with labels int64 [N].

    The tensor may be a view into a memory-mapped file: on the CPU it is then read as it is used.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        assert images.dtype == torch.uint8, f"images are {images.dtype}, not uint8"
        assert images.ndim == 4, f"images have shape {list(images.shape)}, not [N,3,H,W]"
        assert images.shape[1] == 3, f"images have shape {list(images.shape)}, not [N,3,H,W]"
        assert labels.dtype == torch.int64, f"labels are {labels.dtype}, not int64"
        assert labels.shape == images.shape[:1], f"{list(labels.shape)} labels for {len(images)} images"
        self.images, self.labels = images, labels

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = _moved(indices, self.device)
        images = self.images[rows].to(torch.float32, memory_format=torch.contiguous_format)
        return images.div_(255), self.labels[rows]

    def to(self, device: torch.device | str) -> "ArraySplit":
        return ArraySplit(self.images.to(device), self.labels.to(device))

    def gather(self, indices: Tensor, device: torch.device | str) -> "ArraySplit":
        rows = indices.to(self.device)
        return ArraySplit(self.images[rows].to(device), self.labels[rows].to(device))


class SubsetSplit(Split):
    """The samples of another split at ``indices`` int64 [M], in that order."""

    def __init__(self, base: Split, indices: Tensor) -> None:
        assert indices.dtype == torch.int64, f"indices are {indices.dtype}, not int64"
        self.base, self.indices = base, indices.to(base.device)
        self.labels = base.labels[self.indices]
        self._places = indices.tolist() if base.decodes else []  # for threads that must not wait for a GPU

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.fetch(self.indices[_moved(indices, self.device)])

    @property
    def decodes(self) -> bool:
        return self.base.decodes

    def decode(self, index: int) -> Tensor:
        return self.base.decode(self._places[index])

    def to(self, device: torch.device | str) -> Split:
        return self if torch.device(device) == self.device else self.base.gather(self.indices, device)

    def subset(self, indices: Tensor) -> "SubsetSplit":
        return SubsetSplit(self.base, self.indices[indices.to(self.device)])

    def gather(self, indices: Tensor, device: torch.device | str) -> Split:
        return self.base.gather(self.indices[indices.to(self.device)], device)


def _moved(indices: Tensor, device: torch.device) -> Tensor:
    """The indices on ``device``; on the way from the CPU to a GPU nobody waits until the GPU has done its earlier work."""
    return indices.to(device, non_blocking=indices.device.type == "cpu")


def resized(split: Split, size: int) -> ArraySplit:
    """The whole split as uint8 images [N,3,size,size]: bilinear, antialiased where it shrinks. Needs square images."""
    parts = []
    for rows in torch.arange(len(split)).split(RESIZE_CHUNK):
        images, _ = split.fetch(rows)
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        parts.append(images.mul(255).round_().clamp_(0, 255).to(torch.uint8))
    return ArraySplit(torch.cat(parts), split.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of one classification task. ``val`` is held out of training, for calibration."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]  # in label order
    image_size: int  # images are image_size x image_size

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to(self, device: torch.device | str) -> Self:
        """The same data set with every split on ``device``."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def limited(self, n: int) -> Self:
        """Every split cut to at most ``n`` samples, the same ones every time.

        Test keeps the first ``n`` in their order, as leaderboards do; train and val keep classes as equal as
        they can. Raises InputError for ``n`` below 1.
        """
        if n < 1:
            raise InputError(f"limit must be at least 1 sample per split, got {n}")
        return replace(
            self,
            train=_balanced(self.train, n),
            val=_balanced(self.val, n),
            test=self.test if n >= len(self.test) else self.test.subset(torch.arange(n)),
        )

    def resized(self, size: int) -> Self:
        """The same data set in memory with images of ``size`` x ``size``; itself if that is its size already."""
        if size == self.image_size:
            return self
        train, val, test = (resized(s, size) for s in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test, image_size=size)


def _balanced(split: Split, n: int) -> Split:
    return split if n >= len(split) else split.subset(balanced_first(split.labels, n))
