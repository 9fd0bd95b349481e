"""Threat models by example: what is inside, what is outside, and what they say about themselves."""

from typing import Any

import pytest
import torch

from amsdn.errors import InputError
from amsdn.threats import (
    L2Ball,
    LinfBall,
    PatchRegion,
    SparsePixels,
    ThreatModel,
    changed_pixels,
    square_mask,
    unit_length,
)

GREY = torch.full((1, 3, 8, 8), 0.5)

KINDS: tuple[Any, ...] = (LinfBall, L2Ball, SparsePixels, PatchRegion)


def with_pixels(*places: tuple[int, int], value: float = 1.0) -> torch.Tensor:
    x = GREY.clone()
    for i, j in places:
        x[0, 1, i, j] = value
    return x


def test_sparse_counts_a_pixel_once_and_not_one_more() -> None:
    x_adv = with_pixels((0, 0), (3, 4), (7, 7))
    x_adv[0, :, 0, 0] = 0.0  # all channels of a pixel that is changed anyway
    assert SparsePixels(3).spent(x_adv, GREY).item() == 3
    assert SparsePixels(3).contains(x_adv, GREY).all()
    assert not SparsePixels(2).contains(x_adv, GREY).any()


def test_sparse_has_no_tolerance() -> None:
    x_adv = GREY.clone()
    x_adv[0, 0, 0, 0] = torch.nextafter(x_adv[0, 0, 0, 0], torch.tensor(1.0))
    x_adv[0, 2, 5, 5] += 0.1
    assert not SparsePixels(1).contains(x_adv, GREY).any()


@pytest.mark.parametrize(
    ("places", "side"),
    [([], 0), ([(2, 3)], 1), ([(0, 0), (2, 1)], 3), ([(0, 0), (1, 2)], 3), ([(0, 0), (7, 7)], 8), ([(6, 6), (7, 7)], 2)],
)
def test_patch_is_measured_by_its_bounding_box(places: list[tuple[int, int]], side: int) -> None:
    x_adv = with_pixels(*places)
    assert PatchRegion(3).spent(x_adv, GREY).item() == side
    for size in range(1, 9):
        assert PatchRegion(size).contains(x_adv, GREY).item() == (side <= size)


def test_balls_measure_pixel_values() -> None:
    x_adv = with_pixels((0, 0), (1, 1), value=0.8)
    assert LinfBall(0.3).spent(x_adv, GREY).item() == pytest.approx(0.3)
    assert L2Ball(0.3).spent(x_adv, GREY).item() == pytest.approx(0.3 * 2**0.5)
    assert LinfBall(0.3).contains(x_adv, GREY).all()
    assert not LinfBall(0.299).contains(x_adv, GREY).any()
    assert not L2Ball(0.424).contains(x_adv, GREY).any()
    assert L2Ball(0.425).contains(x_adv, GREY).all()


@pytest.mark.parametrize("threat", [LinfBall(1.0), L2Ball(100.0), SparsePixels(64), PatchRegion(8)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.001, -0.001])
def test_what_is_no_image_is_in_no_threat(threat: ThreatModel, value: float) -> None:
    assert not threat.contains(with_pixels((2, 2), value=value), GREY).any()
    assert threat.contains(GREY, GREY).all()
    assert threat.contains(with_pixels((2, 2)), GREY).all()


def test_budgets_per_image_stay_aligned() -> None:
    x = GREY.expand(3, -1, -1, -1)
    threat = SparsePixels(torch.tensor([1, 2, 3]))
    sample = threat.sample(x, torch.Generator().manual_seed(0))
    assert threat.spent(sample, x).tolist() == [1, 2, 3]
    assert threat.contains(sample.flip(0), x).tolist() == [False, True, True]
    assert threat.select(torch.tensor([2, 0])).spent(sample[[2, 0]], x[:2]).tolist() == [3, 1]
    assert threat.select(torch.tensor([2, 0])).contains(sample[[2, 0]], x[:2]).all()
    ball = LinfBall(torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(ball.spent(ball.project(x + 1, x), x), torch.tensor([0.1, 0.2, 0.3]))
    assert LinfBall(0.1).select(torch.tensor([0])) == LinfBall(0.1)


def test_inclusion_description_and_names() -> None:
    assert LinfBall(0.2).includes(LinfBall(0.1))
    assert not LinfBall(0.1).includes(LinfBall(0.2))
    assert not LinfBall(0.2).includes(L2Ball(0.1))
    assert LinfBall(8 / 255).describe() == "linf 8/255"
    assert SparsePixels(20).describe() == "sparse 20"
    for kind in KINDS:
        assert kind(2).with_budget(3).budget == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_budgets_must_be_positive(kind: type[ThreatModel], budget: float) -> None:
    with pytest.raises(InputError, match="must be positive"):
        kind(budget)  # type: ignore[call-arg]


def test_a_patch_must_fit() -> None:
    for call in (PatchRegion(9).sample, PatchRegion(9).random_corners, lambda x: PatchRegion(9).project(x, x)):
        with pytest.raises(InputError, match="does not fit images of 8x8"):
            call(GREY)


def test_square_mask_and_changed_pixels_agree() -> None:
    rows, columns = torch.tensor([0, 5]), torch.tensor([6, 2])
    mask = square_mask(rows, columns, 2, GREY)
    assert mask.flatten(1).sum(1).tolist() == [4, 4]
    assert mask[0, 0, 0:2, 6:8].all()
    assert mask[1, 0, 5:7, 2:4].all()
    x = GREY.expand(2, -1, -1, -1)
    assert torch.equal(changed_pixels(torch.where(mask, 0.0, x), x), mask)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-38, 1e30])
def test_unit_length_at_any_scale(scale: float) -> None:
    direction = scale * torch.tensor([[3.0, -4.0], [0.0, 2.0]])
    torch.testing.assert_close(unit_length(direction), torch.tensor([[0.6, -0.8], [0.0, 1.0]]))
    assert torch.equal(unit_length(torch.zeros(1, 2)), torch.zeros(1, 2))


def test_random_corners_cover_every_place() -> None:
    rows, columns = PatchRegion(6).random_corners(GREY.expand(500, -1, -1, -1), torch.Generator().manual_seed(0))
    assert {*zip(rows.tolist(), columns.tolist(), strict=True)} == {(i, j) for i in range(3) for j in range(3)}
