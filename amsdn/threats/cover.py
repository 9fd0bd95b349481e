"""Whether a few rectangles of one size can cover a set of pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def coverable(changed: Tensor, height: int, width: int, count: int) -> bool:
    """Whether ``count`` rectangles of height x width, inside the image and possibly overlapping, cover every True.

    changed [H,W] bool, on the CPU. Exact: the search tries every choice that could matter.
    """
    rows, columns = changed.shape
    if height > rows or width > columns:
        return False
    # One integer is one image: bit i * columns + j is pixel (i, j).
    flat = changed.flatten().to(torch.uint8)
    packed = (F.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1)
    return _Cover((rows, columns), (height, width)).search(int.from_bytes(bytes(packed.tolist()), "little"), count)


class _Cover:
    def __init__(self, image: tuple[int, int], rectangle: tuple[int, int]) -> None:
        (self.rows, self.columns), (self.height, self.width) = image, rectangle
        self.line = (1 << self.columns) - 1
        self.stamp = sum(((1 << self.width) - 1) << (i * self.columns) for i in range(self.height))
        self.hopeless: set[tuple[int, int]] = set()  # (pixels left, rectangles left) known not to work

    def search(self, left: int, count: int) -> bool:
        """Whether ``count`` rectangles cover the pixels of the bit set ``left``.

        Some rectangle must cover the leftmost pixel of the topmost row. Nothing lies above that row, so the rectangle may
        start in it (or as low as the image allows); and it may be pushed right until its left edge meets a pixel.
        """
        if not left:
            return True
        if not count or left.bit_count() > count * self.height * self.width or (left, count) in self.hopeless:
            return False
        row, column = divmod((left & -left).bit_length() - 1, self.columns)
        top = min(row, self.rows - self.height)
        for edge in self._left_edges(left, top, column):
            if self.search(left & ~(self.stamp << (top * self.columns + edge)), count - 1):
                return True
        self.hopeless.add((left, count))
        return False

    def _left_edges(self, left: int, top: int, column: int) -> list[int]:
        """The left edges worth trying for a rectangle whose first row is ``top`` and that covers ``column``."""
        occupied = 0
        for i in range(top, top + self.height):
            occupied |= (left >> (i * self.columns)) & self.line
        reach = range(column, max(column - self.width, -1), -1)
        return sorted({min(j, self.columns - self.width) for j in reach if occupied >> j & 1}, reverse=True)
