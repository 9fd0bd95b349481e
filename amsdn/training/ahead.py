"""Decoding ahead: the images of the next step are read from their files while the current one is computed.

Only for splits that decode (``Split.decodes``); a split that holds its images hands them out as a step asks for them. Threads
decode single images, since Pillow works outside the interpreter lock; nothing is drawn at random there, so a batch is the same
whenever its images were read. An image that cannot be read raises when its step asks for it, not when a thread comes upon it.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from amsdn.data import Split
from amsdn.data.folder import WORKERS


class Source(Protocol):
    """What hands out images [B,3,H,W] and labels [B] by their place in the training split, int64 [B] on the CPU."""

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]: ...


class ReadAhead:
    """A split whose images are decoded in the order in which they were announced, and kept until others are announced.

    It holds the images of two steps at most, as float32 on the CPU. ``close`` it: nothing is left running then.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        """Batches are to go to ``device``."""
        self.split, self.device = split, device
        self.pool: ThreadPoolExecutor | None = None  # there is none before the first image is announced
        self.images: dict[int, Future[Tensor]] = {}

    def announce(self, now: Sequence[Tensor], then: Sequence[Tensor]) -> None:
        """The images int64 [n] of each part of this step and of the next; what is known of others is forgotten."""
        if not self.split.decodes:
            return
        self.pool = self.pool or ThreadPoolExecutor(WORKERS, thread_name_prefix="decode")
        wanted = dict.fromkeys(place for part in (*now, *then) for place in part.tolist())
        for place in self.images.keys() - wanted.keys():
            self.images.pop(place).cancel()
        for place in wanted:
            if place not in self.images:
                self.images[place] = self.pool.submit(self.split.decode, place)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Split.fetch``, but announced images [B,3,H,W] stay on the CPU, in memory from which a GPU copies without a wait.

        Raises InputError, where the split does, for the first image that cannot be used.
        """
        if self.pool is None:
            return self.split.fetch(indices)
        images = [self.images[place].result() for place in indices.tolist()]
        shape = (len(images), *images[0].shape)
        stacked = torch.stack(images, out=torch.empty(shape, pin_memory=self.device.type == "cuda"))
        labels = self.split.labels
        return stacked, labels[indices.to(labels.device, non_blocking=True)]

    def close(self) -> None:
        """Stop decoding; waits for the images that are being decoded right now, a few hundredths of a second."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.pool, self.images = None, {}
