"""Threat models by example: what is inside, what is outside, and what they say about themselves."""

import itertools
from typing import Any

import pytest
import torch

from amsdn.errors import InputError
from amsdn.threats import (
    L1Ball,
    L2Ball,
    LinfBall,
    PatchRectangles,
    PatchRegion,
    SparsePixels,
    ThreatModel,
    changed_pixels,
    rectangle_mask,
    square_mask,
    unit_length,
)

GREY = torch.full((1, 3, 8, 8), 0.5)

KINDS: tuple[Any, ...] = (LinfBall, L2Ball, L1Ball, SparsePixels, PatchRegion)


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
    assert L1Ball(0.3).spent(x_adv, GREY).item() == pytest.approx(0.6)
    assert L1Ball(0.6).contains(x_adv, GREY).all()
    assert not L1Ball(0.599).contains(x_adv, GREY).any()


@pytest.mark.parametrize("threat", [LinfBall(1.0), L2Ball(100.0), L1Ball(100.0), SparsePixels(64), PatchRegion(8)])
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


def l1_points(seed: int, reach: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six images with values on the walls, points around them, and a radius for each."""
    generator = torch.Generator().manual_seed(seed)
    x = (1.6 * torch.rand(6, 3, 3, 4, generator=generator) - 0.3).clamp(0, 1)
    some = torch.rand(x.shape, generator=generator) < 0.7
    return x, x + reach * some * torch.randn(x.shape, generator=generator), 8 * torch.rand(6, generator=generator) + 1e-2


@pytest.mark.parametrize("reach", [0.01, 0.3, 3.0, 100.0])
@pytest.mark.parametrize("seed", range(8))
def test_l1_projection_is_the_nearest_member(seed: int, reach: float) -> None:
    """p is nearest to z in a convex set C if no m in C has (z - p).(m - p) > 0: the best m is a greedy choice, taken here."""
    x, z, eps = l1_points(seed, reach)
    p = L1Ball(eps).project(z, x)
    assert L1Ball(eps).contains(p, x).all()
    v, at, centre = ((t.double()).flatten(1) for t in (z - p, p - x, x))
    value, order = v.abs().sort(1, descending=True)
    room = torch.where(v > 0, 1 - centre, centre).gather(1, order)
    best = (value * (eps.double().unsqueeze(1) - room.cumsum(1) + room).clamp_min(0).minimum(room)).sum(1)
    gap = best - (v * at).sum(1)
    assert (gap < 1e-4 * (1 + v.abs().amax(1))).all(), gap


@pytest.mark.parametrize("seed", range(8))
def test_l1_projection_against_bisection(seed: int) -> None:
    for reach in (0.05, 1.0, 30.0):
        x, z, eps = l1_points(seed, reach)
        d, centre = (z.double() - x.double()).flatten(1), x.double().flatten(1)
        room = torch.where(d > 0, 1 - centre, centre)
        low, high = torch.zeros(6, 1, dtype=torch.double), d.abs().amax(1, keepdim=True)
        for _ in range(100):
            middle = (low + high) / 2
            too_long = (d.abs() - middle).clamp_min(0).minimum(room).sum(1, keepdim=True) > eps.double().unsqueeze(1)
            low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
        enough = d.abs().minimum(room).sum(1, keepdim=True) <= eps.double().unsqueeze(1)
        change = (d.abs() - torch.where(enough, 0.0, high)).clamp_min(0).minimum(room)
        expected = (centre + d.sign() * change).reshape(x.shape).float()
        torch.testing.assert_close(L1Ball(eps).project(z, x), expected, atol=2e-5, rtol=0)


def test_l1_members_stay_and_budgets_per_image_stay_aligned() -> None:
    x, z, eps = l1_points(0, 1.0)
    ball = L1Ball(eps)
    p = ball.project(z, x)
    assert torch.equal(ball.project(p, x), p)
    torch.testing.assert_close(ball.spent(ball.project(x + 50, x), x), eps.minimum((1 - x).flatten(1).sum(1)), atol=1e-4, rtol=1e-5)
    keep = torch.tensor([4, 1])
    assert torch.equal(ball.select(keep).project(z[keep], x[keep]), p[keep])
    first = ball.sample(x, torch.Generator().manual_seed(0))
    assert ball.contains(first, x).all()
    assert (ball.spent(first, x) > 0.1 * eps).all()
    assert not torch.equal(first, ball.sample(x, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("value", [0.011, 0.3, 0.7, 0.99])
def test_l1_rounding_never_adds_up_over_many_equal_changes(value: float) -> None:
    x = torch.full((1, 3, 96, 96), value)
    for eps in (0.3, 12.0, 300.0):
        p = L1Ball(eps).project(x + 0.37, x)
        assert L1Ball(eps).contains(p, x).all()
        assert (p - x).double().abs().sum() <= eps
        assert L1Ball(eps).spent(p, x).item() == pytest.approx(min(eps, x.numel() * (1 - value)), rel=0.02)


def test_inclusion_description_and_names() -> None:
    assert LinfBall(0.2).includes(LinfBall(0.1))
    assert not LinfBall(0.1).includes(LinfBall(0.2))
    assert not LinfBall(0.2).includes(L2Ball(0.1))
    assert LinfBall(8 / 255).describe() == "linf 8/255"
    assert SparsePixels(20).describe() == "sparse 20"
    assert L1Ball(12.0).describe() == "l1 12"
    assert not L1Ball(12.0).includes(L2Ball(0.1))
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


def every_union(shape: tuple[int, int], height: int, width: int, count: int) -> torch.Tensor:
    """What ``count`` rectangles can cover of an image of this shape, for every choice of places, [choices,H,W] bool."""
    places = itertools.product(range(shape[0] - height + 1), range(shape[1] - width + 1))
    corners = torch.tensor(list(itertools.combinations_with_replacement(places, count)))
    return rectangle_mask(corners, height, width, torch.zeros(1, 3, *shape)).squeeze(1)


@pytest.mark.parametrize(("height", "width", "count"), [(1, 2, 2), (2, 2, 2), (2, 1, 3), (2, 3, 2), (1, 1, 3), (3, 2, 1)])
def test_membership_of_rectangles_against_every_choice_of_places(height: int, width: int, count: int) -> None:
    threat, generator = PatchRectangles(height, width, count), torch.Generator().manual_seed(height + 10 * width)
    x = torch.full((60, 3, 4, 5), 0.5)
    near = torch.where(torch.rand(60, 1, 4, 5, generator=generator) < 0.8, threat.sample(x, generator), x)  # members with gaps
    stray = torch.rand(60, 1, 4, 5, generator=generator) < 0.05
    x_adv = torch.where(stray, 0.0, near)
    unions = every_union((4, 5), height, width, count)
    expected = [not (changed & ~unions).flatten(1).any(1).all() for changed in changed_pixels(x_adv, x).squeeze(1)]
    assert threat.contains(x_adv, x).tolist() == expected
    assert 10 < sum(expected) < 55  # both answers are put to the test
    assert threat.contains(near, x).all()


def test_rectangles_by_example() -> None:
    two = PatchRectangles(2, 4, count=2)
    assert two.budget == 16
    assert two.describe() == "2 patches of 2x4"
    assert PatchRectangles(3, 1).describe() == "1 patch of 3x1"
    far_apart = with_pixels((0, 0), (1, 3), (6, 7), (7, 4))
    assert two.contains(far_apart, GREY).all()
    assert two.spent(far_apart, GREY).item() == 4
    assert not PatchRectangles(4, 2, count=2).contains(far_apart, GREY).any()  # not turned
    assert not two.contains(with_pixels((0, 0), (1, 3), (6, 7), (7, 3)), GREY).any()
    assert not two.contains(with_pixels((0, 0), (4, 4), (7, 7)), GREY).any()
    three_corners = with_pixels((0, 0), (0, 3), (3, 0), (3, 3))  # a greedy cover from the left would fail lower down
    assert PatchRectangles(1, 4, count=2).contains(three_corners, GREY).all()
    assert not two.contains(with_pixels((0, 0), value=float("nan")), GREY).any()
    assert not two.contains(with_pixels((0, 0), value=1.01), GREY).any()
    assert two.with_budget(24) == PatchRectangles(2, 4, count=3)
    assert two.select(torch.tensor([0])) == two


def test_rectangles_include_what_they_can_tile() -> None:
    assert PatchRectangles(4, 8, count=2).includes(PatchRectangles(4, 8))
    assert PatchRectangles(4, 8, count=2).includes(PatchRectangles(8, 8))
    assert PatchRectangles(4, 8, count=2).includes(PatchRegion(8))
    assert not PatchRectangles(4, 8, count=2).includes(PatchRegion(9))
    assert not PatchRectangles(4, 8, count=2).includes(PatchRectangles(8, 4, count=2))
    assert not PatchRectangles(8, 8).includes(SparsePixels(1))
    assert not PatchRectangles(8, 8).includes(PatchRectangles(4, 4, count=2))  # two may lie far apart


@pytest.mark.parametrize("threat", [PatchRectangles(2, 3), PatchRectangles(3, 1, count=3), PatchRectangles(2, 4, count=2)])
def test_samples_and_projections_of_rectangles_are_members(threat: PatchRectangles) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 7, 6, generator=generator)
    sample = threat.sample(x, generator)
    assert threat.contains(sample, x).all()
    assert (threat.spent(sample, x) > 0).all()
    assert torch.equal(threat.project(sample, x), sample)
    point = x + torch.randn(x.shape, generator=generator)
    projected = threat.project(point, x)
    assert threat.contains(projected, x).all()
    assert (threat.spent(projected, x) == threat.budget).float().mean() > 0.8
    if threat.count == 1:
        places = itertools.product(range(7 - threat.height + 1), range(6 - threat.width + 1))
        masks = (rectangle_mask(torch.tensor([[c]]), threat.height, threat.width, x) for c in places)
        nearest = torch.stack([(torch.where(m, point.clamp(0, 1), x) - point).square().flatten(1).sum(1) for m in masks]).amin(0)
        torch.testing.assert_close((projected - point).square().flatten(1).sum(1), nearest)


def test_rectangles_must_be_positive_and_fit() -> None:
    for shape in ((0, 2, 1), (2, -1, 1), (2, 2, 0)):
        with pytest.raises(InputError, match="must be positive"):
            PatchRectangles(*shape)
    for call in (PatchRectangles(9, 1).sample, lambda x: PatchRectangles(1, 9, 2).project(x, x)):
        with pytest.raises(InputError, match="does not fit images of 8x8"):
            call(GREY)
    assert not PatchRectangles(9, 1, count=2).contains(with_pixels((0, 0), (7, 7)), GREY).any()


class _NoUploads:
    """Stands for functions that make a tensor of a number: on an accelerator such an upload waits for the device."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a number became a tensor")


@pytest.mark.parametrize("kind", [LinfBall, L2Ball, L1Ball, SparsePixels])
def test_projection_takes_numbers_and_budgets_per_image_alike(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, x_adv = torch.rand(2, 4, 3, 8, 8, generator=g)
    each = kind(torch.full((4,), 2)).project(x_adv, x), kind(torch.full((4,), 2)).sample(x, g.manual_seed(1))
    monkeypatch.setattr(torch, "as_tensor", _NoUploads())
    monkeypatch.setattr(torch, "tensor", _NoUploads())
    torch.testing.assert_close(kind(2).project(x_adv, x), each[0])
    torch.testing.assert_close(kind(2).sample(x, g.manual_seed(1)), each[1])


@pytest.mark.parametrize("kind", [LinfBall, L2Ball, L1Ball, SparsePixels])
def test_select_does_not_look_at_the_budgets_again(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threat = kind(torch.tensor([1, 2, 3]))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("asks the device for the value of a tensor"))
    chosen = threat.select(torch.tensor([2, 0]))
    assert type(chosen) is kind
    assert chosen.budget.tolist() == [3, 1]
    assert threat.budget.tolist() == [1, 2, 3]
    assert kind(2).select(torch.tensor([1])) == kind(2)


@pytest.mark.parametrize("kind", [LinfBall, L2Ball, L1Ball, SparsePixels])
def test_budgets_are_checked_when_given(kind: Any) -> None:
    for budget in (0, -1, float("nan"), torch.tensor([1.0, 0.0]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(InputError, match="must be positive"):
            kind(budget)
    assert kind(float("inf")).bounded is kind(torch.tensor([1.0, float("inf")])).bounded is False
    assert kind(2).bounded is kind(torch.tensor([1, 2])).bounded is True
