"""Parts are disjoint and complete, and a view shows one part and nothing else."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from amsdn.errors import InputError
from amsdn.utils.partition import Grid, check_grid, part_of_pixels, part_views, random_part_views


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_view(x: Tensor, grid: Grid) -> Tensor:
    """x [3,H,W] through each part, [T,3,H,W]."""
    parts = grid[0] * grid[1]
    return part_views(x.expand(parts, -1, -1, -1), torch.arange(parts), grid)


def fitting(height: int, width: int) -> Iterator[Grid]:
    """A few grids for a size, the finest possible ones included."""
    yield from {(min(r, height), min(c, width)) for r, c in ((1, 1), (2, 3), (8, 8), (40, 40))}


def test_parts_are_disjoint_and_complete_at_every_size() -> None:
    for height in range(1, 41):
        for width in range(1, 41):
            for grid in fitting(height, width):
                part = part_of_pixels(grid, height, width)
                members = torch.bincount(part.flatten(), minlength=grid[0] * grid[1])
                assert part.shape == (height, width)
                assert len(members) == grid[0] * grid[1]
                assert members.min() >= 1
                assert members.max() <= math.ceil(height / grid[0]) * math.ceil(width / grid[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (8, 8), (13, 10), (32, 32), (40, 17)])
def test_a_view_depends_on_its_own_part_to_the_last_bit(size: tuple[int, int]) -> None:
    x = torch.rand(3, *size, generator=seeded())
    for grid in fitting(*size):
        own = part_of_pixels(grid, *size) == torch.arange(grid[0] * grid[1])[:, None, None]  # [T,H,W]
        views = every_view(x, grid)
        for foreign in (math.nan, math.inf, 1e30):
            changed = torch.where(own[:, None], x, foreign)  # image t keeps part t alone
            assert torch.equal(part_views(changed, torch.arange(len(own)), grid), views)
        assert torch.equal(torch.where(own[:, None], views, 0), torch.where(own[:, None], x, 0))  # and shows it unchanged


@pytest.mark.parametrize(("size", "grid"), [((9, 7), (2, 3)), ((32, 32), (6, 6)), ((5, 12), (5, 1)), ((8, 8), (8, 8))])
def test_the_rest_is_interpolated_between_kept_rows_and_columns(size: tuple[int, int], grid: Grid) -> None:
    x = torch.rand(3, *size, generator=seeded(1))
    for part, view in enumerate(every_view(x, grid)):
        rows, columns = np.arange(part // grid[1], size[0], grid[0]), np.arange(part % grid[1], size[1], grid[1])
        kept = x.double().numpy()[:, rows][:, :, columns]
        tall = np.apply_along_axis(lambda line: np.interp(np.arange(size[0]), rows, line), 1, kept)  # noqa: B023
        full = np.apply_along_axis(lambda line: np.interp(np.arange(size[1]), columns, line), 2, tall)  # noqa: B023
        torch.testing.assert_close(view.double(), torch.from_numpy(full), atol=1e-6, rtol=0)


def test_one_image_alone_has_the_views_it_has_in_a_batch() -> None:
    x, part = torch.rand(37, 3, 11, 13, generator=seeded(2)), torch.randint(20, (37,), generator=seeded(3))
    together = part_views(x, part, (4, 5))
    alone = torch.cat([part_views(x[i : i + 1], part[i : i + 1], (4, 5)) for i in range(37)])
    assert torch.equal(together, alone)


def test_gradients_reach_the_own_part_and_no_other_pixel() -> None:
    x = torch.rand(6, 3, 7, 8, generator=seeded(4)).requires_grad_(True)
    part = torch.arange(6)
    weights = torch.rand(6, 3, 7, 8, generator=seeded(5)) + 0.1
    (part_views(x, part, (2, 3)) * weights).sum().backward()
    own = (part_of_pixels((2, 3), 7, 8) == part[:, None, None])[:, None].expand_as(x)
    assert x.grad is not None
    assert torch.equal(x.grad > 0, own)
    torch.testing.assert_close(x.grad.sum((1, 2, 3)), weights.sum((1, 2, 3)))  # weights of a view sum to one


def test_random_views_are_views_of_all_parts_of_all_grids() -> None:
    grids: list[Grid] = [(1, 2), (3, 2)]
    x = torch.rand(3, 6, 6, generator=seeded(6)).expand(600, -1, -1, -1)
    views = random_part_views(x, grids, seeded(7))
    known = torch.cat([every_view(x[0], grid) for grid in grids])
    same = (views[:, None] == known).flatten(2).all(2)
    assert bool((same.sum(1) == 1).all())
    shares = same.float().mean(0)
    expected = torch.tensor([1 / 4] * 2 + [1 / 12] * 6)
    assert bool(((shares - expected).abs() < 4 * (expected * (1 - expected) / 600).sqrt()).all())
    state = torch.random.get_rng_state()
    assert torch.equal(views, random_part_views(x, grids, seeded(7)))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("grid", "message"),
    [((0, 2), "at least 1"), ((2, -1), "at least 1"), ((9, 2), "9x2 parts do not fit images of 8x6"), ((2, 7), "fewer")],
)
def test_grids_that_cannot_be(grid: Grid, message: str) -> None:
    x = torch.rand(1, 3, 8, 6)
    for call in (
        lambda: check_grid(grid, 8, 6),
        lambda: part_views(x, torch.zeros(1, dtype=torch.int64), grid),
        lambda: random_part_views(x, [(1, 1), grid], seeded()),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_no_grid_to_draw_from() -> None:
    with pytest.raises(InputError, match="no grid"):
        random_part_views(torch.rand(1, 3, 4, 4), [], seeded())
