"""Properties of every threat model on random images: samples are members, projections are the nearest members."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amsdn.threats import L1Ball, L2Ball, LinfBall, PatchRectangles, PatchRegion, SparsePixels, ThreatModel

quick = settings(max_examples=40, deadline=None, database=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
threats = st.one_of(
    st.floats(1e-3, 1.5).map(LinfBall),
    st.floats(1e-2, 10).map(L2Ball),
    st.floats(1e-2, 200).map(L1Ball),
    st.builds(PatchRectangles, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    st.integers(1, 30).map(SparsePixels),
    st.integers(1, 4).map(PatchRegion),
)
shapes = st.tuples(st.integers(1, 3), st.integers(4, 7), st.integers(4, 7))


def draw(seed: int, shape: tuple[int, int, int], reach: float = 1.0) -> tuple[Tensor, Tensor]:
    """Images, some of whose values sit on the walls of the box, and arbitrary points around them."""
    generator = torch.Generator().manual_seed(seed)
    b, h, w = shape
    x = (1.4 * torch.rand(b, 3, h, w, generator=generator) - 0.2).clamp(0, 1)
    some = torch.rand(b, 1, h, w, generator=generator) < 0.5
    return x, x + reach * some * torch.randn(b, 3, h, w, generator=generator)


@quick
@given(threats, shapes, seeds, st.sampled_from([0.01, 0.3, 3.0]))
def test_projection_is_a_member_and_idempotent(threat: ThreatModel, shape: tuple[int, int, int], seed: int, reach: float) -> None:
    x, point = draw(seed, shape, reach)
    before = x.clone(), point.clone()
    projected = threat.project(point, x)
    assert threat.contains(projected, x).all()
    torch.testing.assert_close(threat.project(projected, x), projected, atol=1e-6, rtol=0)
    assert torch.equal(threat.project(x, x), x)
    assert torch.equal(x, before[0])
    assert torch.equal(point, before[1])


@quick
@given(threats, shapes, seeds)
def test_samples_are_members_and_random(threat: ThreatModel, shape: tuple[int, int, int], seed: int) -> None:
    x, _ = draw(seed, shape)
    first = threat.sample(x, torch.Generator().manual_seed(seed))
    assert threat.contains(first, x).all()
    assert torch.equal(first, threat.sample(x, torch.Generator().manual_seed(seed)))
    assert not torch.equal(first, threat.sample(x, torch.Generator().manual_seed(seed + 1)))


@quick
@given(threats, shapes, seeds)
def test_no_random_member_is_nearer_than_the_projection(threat: ThreatModel, shape: tuple[int, int, int], seed: int) -> None:
    if isinstance(threat, L2Ball):
        return  # with the box it is only approached; see the next test
    x, point = draw(seed, shape)
    nearest = (threat.project(point, x) - point).flatten(1).norm(dim=1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        member = threat.sample(x, generator)
        assert (nearest <= (member - point).flatten(1).norm(dim=1) + 1e-5).all()


@quick
@given(st.floats(0.05, 3), seeds)
def test_l2_projection_is_radial_away_from_the_walls(eps: float, seed: int) -> None:
    x = torch.full((1, 3, 4, 4), 0.5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    direction = direction / direction.abs().amax() * 0.45  # inside the box
    length = float(direction.norm())
    expected = x + direction * min(1.0, eps / length)
    torch.testing.assert_close(L2Ball(eps).project(x + direction, x), expected)


def distance(member: Tensor, point: Tensor) -> float:
    return float((member - point).double().square().sum())


@pytest.mark.parametrize("k", [1, 2, 3])
@quick
@given(seeds)
def test_sparse_projection_against_every_subset(k: int, seed: int) -> None:
    x, point = draw(seed, (1, 3, 3))
    best = float("inf")
    for chosen in itertools.combinations(range(9), k):
        mask = torch.zeros(9, dtype=torch.bool)
        mask[list(chosen)] = True
        best = min(best, distance(torch.where(mask.reshape(1, 1, 3, 3), point.clamp(0, 1), x), point))
    assert distance(SparsePixels(k).project(point, x), point) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
@quick
@given(seeds)
def test_patch_projection_against_every_place(size: int, seed: int) -> None:
    x, point = draw(seed, (1, 4, 5))
    best = float("inf")
    for i, j in itertools.product(range(4 - size + 1), range(5 - size + 1)):
        member = x.clone()
        member[:, :, i : i + size, j : j + size] = point.clamp(0, 1)[:, :, i : i + size, j : j + size]
        best = min(best, distance(member, point))
    assert distance(PatchRegion(size).project(point, x), point) == pytest.approx(best, rel=1e-6)


@quick
@given(st.integers(1, 12), seeds)
def test_one_pixel_too_many_is_outside(k: int, seed: int) -> None:
    x, _ = draw(seed, (2, 4, 4))
    flipped = torch.where(x > 0.5, 0.0, 1.0)
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    for count in (k, k + 1):
        mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, order[:, :count], True).reshape(2, 1, 4, 4)
        assert (SparsePixels(k).contains(torch.where(mask, flipped, x), x) == (count <= k)).all()


@quick
@given(st.integers(1, 5), seeds)
def test_a_patch_one_pixel_too_wide_is_outside(size: int, seed: int) -> None:
    x, _ = draw(seed, (1, 7, 7))
    flipped = torch.where(x > 0.5, 0.0, 1.0)
    generator = torch.Generator().manual_seed(seed)
    i, j = (int(torch.randint(7 - size, (), generator=generator)) for _ in range(2))
    for height, width in ((size, size), (size + 1, 1), (1, size + 1)):
        x_adv = x.clone()
        x_adv[:, :, i : i + height, j : j + width] = flipped[:, :, i : i + height, j : j + width]
        assert (PatchRegion(size).contains(x_adv, x) == (max(height, width) <= size)).all()
