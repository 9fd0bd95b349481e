"""Disjoint sets of pixels, and what the image looks like when only one of them is seen.

The pixels of an image are split into ``rows * columns`` parts: pixel (r, c) belongs to part (r % rows) * columns + c % columns,
so every part is a strided grid spread over the whole image. The *view* of a part shows its pixels at their places and fills
the rest between them, as a photograph enlarged from few pixels does. A changed pixel changes the view of the one part that
it belongs to and leaves every other view as it was, to the last bit: that is all an l0 certificate needs.

Feature partition aggregation (Hammoudeh & Lowd, "Provable Robustness against a Union of l0 Adversarial Attacks", AAAI 2024)
votes over disjoint features with one network for each set of them. Here one network serves all parts, so the missing pixels are
filled in to look like an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from amsdn.errors import InputError

Grid = tuple[int, int]
"""(rows, columns) of a partition into rows * columns parts."""


def check_grid(grid: Grid, height: int, width: int) -> None:
    """Raise InputError where the grid has no parts, or where images of this size leave one of its parts without pixels."""
    if min(grid) < 1:
        raise InputError(f"pixel partition: rows and columns must be at least 1, got {grid[0]}x{grid[1]}")
    if grid[0] > height or grid[1] > width:
        raise InputError(
            f"pixel partition: {grid[0]}x{grid[1]} parts do not fit images of {height}x{width}, some would have no pixel; use fewer"
        )


def part_of_pixels(grid: Grid, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The part that each pixel belongs to, int64 [H,W]."""
    row = torch.arange(height, device=device) % grid[0]
    column = torch.arange(width, device=device) % grid[1]
    return row[:, None] * grid[1] + column


def part_views(x: Tensor, part: Tensor, grid: Grid) -> Tensor:
    """Image n of x [N,3,H,W] seen through the pixels of its part ``part[n]`` alone; part int64 [N] -> [N,3,H,W].

    Between the kept rows and columns the view is bilinear, beyond them it repeats the nearest. Values stay within the range
    of the kept pixels up to rounding. Foreign pixels are never read into the sum, not even with weight zero, and every value
    is computed alike whatever else is in the batch. Differentiable. Raises InputError where a part would be empty.
    """
    check_grid(grid, *x.shape[2:])
    return _interpolated(x, part // grid[1], part % grid[1], grid[0], grid[1])


def random_part_views(x: Tensor, grids: Sequence[Grid], generator: torch.Generator) -> Tensor:
    """For training: each image of x [B,3,H,W] through one random part of one random grid of ``grids`` -> [B,3,H,W].

    Grids are equally likely, and so are the parts of a grid. The draws come from ``generator``, which may live on another
    device. Raises InputError for a grid that does not fit, or for no grid.
    """
    if not grids:
        raise InputError("pixel partition: no grid to draw from; name at least one, such as 4x4")
    for grid in grids:
        check_grid(grid, *x.shape[2:])
    drawn = torch.rand(3, len(x), dtype=torch.float64, generator=generator, device=generator.device).to(x.device)
    choice = (drawn[0] * len(grids)).long()
    rows = columns = torch.zeros_like(choice)
    for number, grid in enumerate(grids):  # a table of grids would have to be uploaded, and waited for
        rows, columns = rows.masked_fill(choice == number, grid[0]), columns.masked_fill(choice == number, grid[1])
    return _interpolated(x, (drawn[1] * rows).long(), (drawn[2] * columns).long(), rows, columns)


def _interpolated(x: Tensor, row: Tensor, column: Tensor, rows: Tensor | int, columns: Tensor | int) -> Tensor:
    """x [N,3,H,W] from its pixels (row + i * rows, column + j * columns) alone; first between rows, then between columns."""
    image = torch.arange(len(x), device=x.device)[:, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None]
    low, high, weight = _neighbours(row, rows, x.shape[2])
    tall = _between(x[image, channel, low[:, None]], x[image, channel, high[:, None]], weight[:, None, :, None].to(x.dtype))
    low, high, weight = (t[:, None, None].expand(-1, *tall.shape[1:3], -1) for t in _neighbours(column, columns, x.shape[3]))
    return _between(tall.gather(3, low), tall.gather(3, high), weight.to(x.dtype))


def _neighbours(first: Tensor, stride: Tensor | int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each place of a line [N,length]: the kept places on both sides of it, and the weight in [0,1) of the higher one.

    Line n keeps the places first[n], first[n] + stride[n], ... below ``length``. Beyond the outermost kept places both
    neighbours are the outermost one and the weight is 0.
    """
    first = first[:, None]
    stride = stride[:, None] if isinstance(stride, Tensor) else stride
    place = torch.arange(length, device=first.device)
    last = (length - 1 - first) // stride
    step = torch.div(place - first, stride, rounding_mode="floor").clamp_min(0).minimum(last)
    low = first + step * stride
    high = first + (step + 1).minimum(last) * stride
    weight = (place - low).clamp_min(0).double() / stride
    return low, high, torch.where(high == low, torch.zeros_like(weight), weight)


def _between(low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    """low where the weight is 0, exactly, and on the line to ``high`` elsewhere."""
    return low + (high - low) * weight
