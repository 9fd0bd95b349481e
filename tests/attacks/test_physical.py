"""The random transformations of a patch: exact where nothing is transformed, confined whatever is, differentiable."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from attack_toys import images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amsdn.attacks.patch_attacks import cut
from amsdn.attacks.physical import (
    DIGITAL,
    LIMITS,
    NONE,
    PHYSICAL,
    Draws,
    GaussianBlur,
    MotionBlur,
    Transformations,
    _homography,
    apply,
    render,
)
from amsdn.errors import InputError
from amsdn.threats import PatchRegion

EXTREME = Transformations(
    scale=(0.05, 1.0),
    rotation=(0, 180),
    tilt=(0, 75),
    brightness=(0, 0.9),
    contrast=(0, 0.9),
    tone=(0, 0.25),
    gain=(0, 0.9),
    offset=(0, 0.9),
    noise=0.5,
    blur=GaussianBlur((0, 3)),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patch(size: int = 8, seed: int = 5) -> Tensor:
    return torch.rand(3, size, size, generator=seeded(seed))


def drawn(size: int = 8, **changes: Tensor) -> Draws:
    """One draw that changes nothing but what is named."""
    return dataclasses.replace(NONE.sample(1, size, seeded()), **changes)


@pytest.mark.parametrize("size", [1, 3, 5, 8, 13])
def test_the_identity_shows_the_patch_bit_for_bit(size: int) -> None:
    x, content = images(6), patch(size)
    draws = NONE.sample(6, size, seeded())
    seen = apply(x, content, draws)
    corner = draws.corners(16, 16)
    assert torch.equal(cut(seen, corner, size), content.expand(6, -1, -1, -1))
    assert (PatchRegion(size).spent(seen, x) == size).all()


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_rot90_and_counter_clockwise(turns: int) -> None:
    light, cover = render(patch(), drawn(rotation=torch.tensor([turns * math.pi / 2])))
    torch.testing.assert_close(light[0], torch.rot90(patch(), turns, (1, 2)), rtol=0, atol=1e-7)
    assert (cover == 1).all()


def test_half_the_scale_averages_two_by_two() -> None:
    centred = drawn(scale=torch.tensor([0.5]), shift=torch.zeros(1, 2))
    light, cover = render(patch(), centred)
    torch.testing.assert_close(light[0, :, 2:6, 2:6], torch.nn.functional.avg_pool2d(patch(), 2))
    assert cover.sum() == 16
    assert (cover[0, 0, 2:6, 2:6] == 1).all()


def test_a_finer_print_is_seen_at_the_size_asked_for() -> None:
    fine = patch(4).repeat_interleave(3, 1).repeat_interleave(3, 2)  # 12 x 12, in blocks of 3
    torch.testing.assert_close(render(fine, drawn(4))[0], render(patch(4), drawn(4))[0])


def test_turned_by_an_eighth_it_covers_half_its_bounding_square() -> None:
    _, cover = render(patch(), drawn(rotation=torch.tensor([math.pi / 4])))
    assert float(cover.mean()) == pytest.approx(0.5, abs=0.02)
    assert cover[0, 0, 4, 0] > 0.2  # it touches all four sides
    assert cover[0, 0, 0, 0] == 0


def test_tilt_is_perspective_the_far_side_is_shorter() -> None:
    """A square tilted by a about the vertical axis, seen from d half sides away: closed form of its outline."""
    angle, d = math.radians(50), 4.0
    _, cover = render(patch(32), drawn(32, tilt=torch.tensor([[angle, 0.0]]), shift=torch.zeros(1, 2)))
    near, far = 1 / (d - math.sin(angle)), 1 / (d + math.sin(angle))  # half heights of the two vertical edges, up to a factor
    columns = cover[0, 0].sum(0)
    seen = columns[columns > 0.5]  # the outermost may be covered in part
    width = math.cos(angle) * (near + far) / (2 * near)  # the edges lie at cos(a) near and cos(a) far; the height fills the window
    assert float(cover.sum(2).gt(0.5).sum()) == pytest.approx(32 * width, abs=1.5)
    assert float(torch.minimum(seen[1], seen[-2])) == pytest.approx(32 * far / near, abs=1.5)
    assert float(torch.maximum(seen[1], seen[-2])) == pytest.approx(32, abs=1.5)
    assert seen[-2] > seen[1]  # a positive angle brings the right side nearer
    _, cover = render(patch(32), drawn(32, tilt=torch.tensor([[0.0, angle]]), shift=torch.zeros(1, 2)))
    rows = cover[0, 0].sum(1)
    assert torch.equal(rows[rows > 0.5].flip(0), seen)  # and the top


def test_the_camera_is_a_pinhole_before_a_rotated_square() -> None:
    turn, upright, level = 0.3, 0.5, -0.8
    (c1, s1), (c2, s2), (c3, s3) = ((math.cos(a), math.sin(a)) for a in (-turn, upright, level))
    about_z = torch.tensor([[c1, -s1, 0], [s1, c1, 0], [0, 0, 1]])
    about_y = torch.tensor([[c2, 0, s2], [0, 1, 0], [-s2, 0, c2]])
    about_x = torch.tensor([[1, 0, 0], [0, c3, -s3], [0, s3, c3]])
    square = torch.tensor([[-1.0, -1, 1, 1], [-1, 1, -1, 1], [0, 0, 0, 0]])
    seen = about_x @ about_y @ about_z @ square + torch.tensor([[0.0], [0], [4]])
    draws = drawn(rotation=torch.tensor([turn]), tilt=torch.tensor([[upright, level]]), shift=torch.zeros(1, 2))
    mapped = _homography(draws)[0] @ torch.cat([square[:2], torch.ones(1, 4)])

    def normalised(points: Tensor) -> Tensor:
        flat = points[:2] / points[2]
        low, high = flat.aminmax(dim=1, keepdim=True)
        return (2 * flat - low - high) / (high - low).max()

    torch.testing.assert_close(normalised(mapped), normalised(seen))
    torch.testing.assert_close(mapped[:2] / mapped[2], normalised(seen))  # centred, and touching the window's sides


@pytest.mark.parametrize("ranges", [DIGITAL, PHYSICAL, PHYSICAL.held_out(), EXTREME, EXTREME.held_out()])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_every_draw_stays_in_its_square(ranges: Transformations, size: int) -> None:
    x, content = images(40), patch(size)
    draws = ranges.sample(40, size, seeded(1))
    seen = apply(x, content, draws)
    corner = draws.corners(16, 16)
    assert PatchRegion(size).contains(seen, x).all()
    assert (corner >= 0).all()
    assert (corner <= 16 - size).all()
    _, cover = render(content, draws)
    assert (cover >= 0).all()
    assert (cover <= 1 + 1e-6).all()
    if size > 1 and ranges not in (EXTREME, EXTREME.held_out()):  # which may shrink the patch to less than a pixel
        assert (cover.flatten(1).sum(1) > 0).all()


def test_the_bounding_square_is_the_scale_whatever_the_angle() -> None:
    draws = Transformations(scale=(0.5, 0.5), rotation=(0, 180), tilt=(0, 60)).sample(50, 32, seeded())
    _, cover = render(patch(), draws)
    hit = cover[:, 0] > 0
    side = torch.maximum(hit.any(1).sum(1), hit.any(2).sum(1))
    assert ((side >= 15) & (side <= 17)).all(), side


def test_places_reach_every_corner_and_a_fixed_one_stays() -> None:
    corner = NONE.sample(2000, 14, seeded()).corners(16, 16)
    assert len({tuple(c) for c in corner.tolist()}) == 9
    fixed = Transformations(place=(2, 1)).sample(3, 5, seeded())
    assert fixed.corners(16, 16).tolist() == [[2, 1]] * 3
    with pytest.raises(InputError, match=r"at \(2, 1\) does not fit images of 6x16"):
        fixed.corners(6, 16)
    with pytest.raises(InputError, match="a patch of 17 px does not fit images of 16x16; choose a smaller size"):
        apply(images(2), patch(17), NONE.sample(2, 17, seeded()))


def test_light_and_print_colour() -> None:
    content = torch.full((3, 4, 4), 0.5)
    black = torch.zeros(3, 4, 4)

    def colour(of: Tensor, **changes: Tensor) -> list[float]:
        light, _ = render(of, drawn(4, **changes))
        return [round(v, 4) for v in light[0, :, 1, 2].tolist()]

    channels = torch.tensor([[0.1, 0.0, -0.1]])
    assert colour(content, tone=channels) == [0.6, 0.5, 0.4]
    assert colour(black, tone=channels) == [0, 0, 0]
    assert colour(content, gain=1 + channels) == [0.55, 0.5, 0.45]
    assert colour(black, offset=channels) == [0.1, 0, 0]
    assert colour(content, brightness=torch.tensor([0.2])) == [0.7] * 3
    assert colour(black, contrast=torch.tensor([0.8])) == [0.1] * 3
    assert colour(black, contrast=torch.tensor([1.2])) == [0] * 3


@pytest.mark.parametrize("blur", [GaussianBlur((0.5, 1.5)), MotionBlur((2.0, 4.0))])
def test_blur_keeps_the_light_it_does_not_push_out(blur: GaussianBlur | MotionBlur) -> None:
    draws = Transformations(scale=(0.3, 0.3), blur=blur).sample(30, 24, seeded())
    centred = dataclasses.replace(draws, shift=torch.zeros(30, 2))
    sharp, area = render(patch(), dataclasses.replace(centred, blur=GaussianBlur()))
    light, cover = render(patch(), centred)
    torch.testing.assert_close(light.sum((2, 3)), sharp.sum((2, 3)), rtol=1e-3, atol=0)
    torch.testing.assert_close(cover.sum((2, 3)), area.sum((2, 3)), rtol=1e-3, atol=0)
    assert (light.amax((1, 2, 3)) < sharp.amax((1, 2, 3))).all()
    moved = (centred.blur_width > 0).sum(1)
    assert (moved == (1 if isinstance(blur, MotionBlur) else 2)).all()


def test_gaussian_blur_of_a_point_is_the_normal_density() -> None:
    draws = dataclasses.replace(drawn(1), size=21, blur=GaussianBlur((2, 2)), blur_width=torch.full((1, 2), 2.0))
    point = dataclasses.replace(draws, scale=torch.tensor([1 / 21]), shift=torch.zeros(1, 2))
    light, _ = render(torch.ones(3, 1, 1), point)
    offset = torch.arange(-10, 11)
    density = (-offset.square() / 8.0).exp() / math.sqrt(8 * math.pi)
    torch.testing.assert_close(light[0, 0], density.unsqueeze(1) * density, rtol=1e-3, atol=1e-7)


def test_gradient_is_that_of_finite_differences() -> None:
    x = images(2).double()
    draws = PHYSICAL.sample(2, 5, seeded(3))
    content = 0.3 + 0.4 * patch(5).double()
    weight = images(2, seed=9).double()

    def value(c: Tensor) -> Tensor:
        return (apply(x, c, draws) * weight).sum()

    leaf = content.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    assert (gradient != 0).all()
    step = 1e-6
    for index in [(0, 0, 0), (1, 2, 3), (2, 4, 4)]:
        nudge = torch.zeros_like(content)
        nudge[index] = step
        slope = (value(content + nudge) - value(content - nudge)) / (2 * step)
        torch.testing.assert_close(gradient[index], slope, rtol=1e-6, atol=1e-9)


def test_gradient_does_not_vanish_at_black_and_white() -> None:
    """Of torch.clamp it does, and a value once black would stay black."""
    for level in (0.0, 0.5, 1.0):
        leaf = torch.full((3, 4, 4), level, requires_grad=True)
        for ranges, least in ((NONE, 50.0), (DIGITAL, 10.0), (PHYSICAL, 2.0)):
            (gradient,) = torch.autograd.grad(apply(images(50), leaf, ranges.sample(50, 4, seeded())).sum(), leaf)
            assert (gradient >= least).all(), (level, ranges, gradient.min())


def test_one_patch_each_and_one_for_all_agree() -> None:
    x, draws = images(3), PHYSICAL.sample(3, 6, seeded())
    each = torch.stack([patch(6, s) for s in range(3)])
    together = apply(x, each, draws)
    for i in range(3):
        torch.testing.assert_close(apply(x, each[i], draws)[i], together[i])


def test_draws_follow_the_generator_alone() -> None:
    def flat(d: Draws) -> list[Tensor]:
        return [v for f in dataclasses.fields(d) if isinstance(v := getattr(d, f.name), Tensor)]

    state = torch.get_rng_state()
    first, again, other = (flat(PHYSICAL.sample(4, 5, seeded(s))) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.numel() and a.std() > 0)


def test_held_out_draws_lie_outside_everything_trained_on() -> None:
    trained, held_out = PHYSICAL.sample(500, 6, seeded()), PHYSICAL.held_out().sample(500, 6, seeded(1))
    assert PHYSICAL.held_out().scale == PHYSICAL.scale
    for name in ("rotation", "tilt", "brightness", "tone", "offset"):
        assert getattr(held_out, name).abs().min() >= getattr(trained, name).abs().max(), name
        assert getattr(held_out, name).std() > 0, name
    for name in ("contrast", "gain"):
        assert (getattr(held_out, name) - 1).abs().min() >= (getattr(trained, name) - 1).abs().max() - 1e-6, name
    assert isinstance(held_out.blur, MotionBlur)
    assert isinstance(PHYSICAL.held_out().held_out().blur, GaussianBlur)
    assert NONE.held_out() == dataclasses.replace(NONE, blur=MotionBlur())  # nothing was varied, nothing is


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.9, 0.8)},
        {"scale": (0.5, 1.1)},
        {"noise": -0.1},
        {"place": (-1, 0)},
        *({name: (0.0, limit * 1.01)} for name, limit in LIMITS.items()),
        *({name: (-0.1, 0.1)} for name in LIMITS),
    ],
)
def test_unusable_ranges_are_refused(settings: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(InputError, match=f"Transformations: {next(iter(settings))} must"):
        Transformations(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [None, (1, 2)])
def test_no_draw_copies_constants_to_the_device(place: tuple[int, int] | None) -> None:
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    ranges, generator = dataclasses.replace(PHYSICAL, place=place), torch.Generator().manual_seed(0)
    x, patch = images(2, 12), torch.rand(3, 5, 5, generator=generator)
    with Calls():
        apply(x, patch, ranges.sample(2, 5, generator))
    assert "grid_sampler_2d" in called
    assert "lift_fresh" not in called  # torch.tensor, which waits for an accelerator


def test_unusable_blur_is_refused() -> None:
    with pytest.raises(InputError, match="0 <= low <= high"):
        GaussianBlur((2, 1))
