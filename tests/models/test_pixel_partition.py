"""Votes over disjoint pixels against every image of a tiny world."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.pixel_partition import TOLERANCE, PartAverage, PixelPartition
from amsdn.protocols import is_stochastic, masked_voting_of, pixel_voting_of, surrogate_of
from amsdn.utils.partition import Grid, part_views
from amsdn.utils.voting import changes_survived, run_off


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Lookup(nn.Module):
    """Any order of three classes for every view: no smoothness for a certificate to lean on.

    Of all views, ``nan_share`` have no finite logits, and for ``close_share`` rounding decides between the best two, here by
    the size of the pass.
    """

    ORDERS = torch.tensor(list(itertools.permutations([3.0, 2.0, 1.0])))

    def __init__(self, seed: int = 0, nan_share: float = 0.0, close_share: float = 0.0) -> None:
        super().__init__()
        draws = seeded(seed)
        self.order = torch.randint(6, (9973,), generator=draws)
        kind = torch.rand(2, 9973, generator=draws)
        self.order[kind[0] < 0.5] = 5  # so that some images are certified
        self.broken, self.close = kind[1] < nan_share, kind[1] > 1 - close_share

    def forward(self, x: Tensor) -> Tensor:
        levels = (x * 24).round().long().flatten(1)
        key = (levels * (torch.arange(levels.shape[1]) ** 2 + 7)).sum(1) % len(self.order)
        logits = self.ORDERS[self.order[key]]
        rounded = torch.where(logits == 2, 3 + (1e-4 if len(x) % 2 else -1e-4), logits)
        logits = torch.where(self.close[key][:, None], rounded, logits)
        return torch.where(self.broken[key][:, None], math.nan, logits)


class Net(nn.Module):
    """A random convolution whose answers vary."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
            )
        self.largest_pass = 0
        views = torch.rand(64, 3, 8, 8, generator=seeded(9))
        self.offset = self.net(8 * views - 4).mean(0).detach()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.largest_pass = max(self.largest_pass, len(x))
        return 4 * (self.net(8 * x - 4) - self.offset)


COLOURS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
MORE_COLOURS = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.5]])


def all_images(height: int, width: int, colours: Tensor) -> tuple[Tensor, Tensor]:
    """(every image over the colours [N,3,H,W], in how many pixels any two of them differ [N,N])."""
    codes = torch.tensor(list(itertools.product(range(len(colours)), repeat=height * width)))
    return colours[codes].reshape(-1, height, width, 3).permute(0, 3, 1, 2).contiguous(), (codes[:, None] != codes).sum(2)


def nearest_other(claimed: Tensor, answers: Tensor, distance: Tensor) -> Tensor:
    """The fewest pixels in which an image differs whose answer is not the one claimed for this one, [N]."""
    return torch.where(claimed[:, None] != answers, distance, 99).amin(1)


WORLDS = [
    ((3, 3), COLOURS, (3, 3)),
    ((3, 3), COLOURS, (2, 2)),
    ((3, 3), COLOURS, (1, 3)),
    ((2, 3), MORE_COLOURS, (2, 3)),
    ((1, 6), MORE_COLOURS, (1, 5)),
]


@pytest.mark.parametrize(("size", "colours", "grid"), WORLDS)
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)], ids=["plain", "nan", "rounding"])
def test_no_set_of_pixels_in_no_colours_changes_a_certified_answer(
    size: tuple[int, int], colours: Tensor, grid: Grid, shares: tuple[float, float]
) -> None:
    images, distance = all_images(*size, colours)
    for seed in range(3):
        net = Lookup(seed, *shares).eval()
        claimed, radius = PixelPartition(net, *grid).certified_radius(images)
        for views_per_pass in (256, 255):  # whatever the passes round to
            answers = PixelPartition(net, *grid, views_per_pass=views_per_pass)(images).argmax(1)
            assert bool((radius < nearest_other(claimed, answers, distance)).all())
        assert bool((radius >= 1).any())


@pytest.mark.parametrize("mistake", ["none", "one pixel more", "ties for us", "undecided voters ignored"])
def test_the_exhaustive_adversary_finds_every_mistake(mistake: str) -> None:
    found = False
    for (size, colours, grid), seed in itertools.product(WORLDS, range(4)):
        images, distance = all_images(*size, colours)
        net = Lookup(seed, close_share=0.1).eval()
        logits = PixelPartition(net, *grid).part_logits(images)
        if mistake == "ties for us":  # certify for the opposite order of classes, where the ties that are lost here are won
            claimed, radius = changes_survived(logits.flip(2), TOLERANCE)
            claimed = 2 - claimed
        else:
            claimed, radius = changes_survived(logits, 0.0 if mistake == "undecided voters ignored" else TOLERANCE)
        answers = PixelPartition(net, *grid, views_per_pass=255)(images).argmax(1)
        claims = radius + (mistake == "one pixel more")
        found |= bool((claims >= nearest_other(claimed, answers, distance)).any())
    assert found == (mistake != "none")


def test_voters_are_the_classifier_on_the_views_and_the_answer_is_theirs() -> None:
    net, x = Net(), torch.rand(40, 3, 9, 8, generator=seeded(1))
    defence = PixelPartition(net, 3, 2, tolerance=0)
    views = torch.stack([part_views(x, torch.full((40,), part), (3, 2)) for part in range(6)], 1)
    expected = torch.stack([net(v) for v in views.unbind(1)], 1)
    torch.testing.assert_close(defence.part_logits(x), expected)
    answers = run_off(expected)
    assert len(answers.unique()) == 3
    assert not torch.equal(answers, expected.softmax(2).mean(1).argmax(1))
    assert torch.equal(defence(x).argmax(1), answers)
    answer, radius = defence.certified_radius(x)
    assert torch.equal(answer, answers)
    assert torch.equal(radius, changes_survived(expected, 0.0)[1])


def test_other_parts_of_the_image_do_not_change_a_vote() -> None:
    defence, x = PixelPartition(Net(), 4, 4), torch.rand(4, 3, 8, 8, generator=seeded(2))
    changed = x.clone()
    changed[:, :, 2::4, 1::4] = torch.rand(4, 3, 2, 2, generator=seeded(3)).round()
    before, after = defence.part_logits(x), defence.part_logits(changed)
    part = 2 * 4 + 1
    others = [t for t in range(16) if t != part]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, part], after[:, part])


def test_small_passes_and_other_images_change_nothing() -> None:
    net, x = Net(), torch.rand(9, 3, 8, 8, generator=seeded(4))
    whole = PixelPartition(net, 3, 3, views_per_pass=1000)
    scores, found = whole(x), torch.stack(whole.certified_radius(x))
    assert net.largest_pass == 81
    net.largest_pass = 0
    for views_per_pass in (1, 7, 64):
        chunked = PixelPartition(net, 3, 3, views_per_pass=views_per_pass)
        torch.testing.assert_close(chunked(x), scores)
        assert torch.equal(torch.stack(chunked.certified_radius(x)), found)
    assert net.largest_pass == 64  # memory is bounded by what was asked for, not by the images or the parts
    torch.testing.assert_close(torch.cat([whole(image) for image in x.split(1)]), scores)
    assert torch.equal(torch.cat([torch.stack(whole.certified_radius(image)) for image in x.split(2)], 1), found)


def test_ties_go_to_the_smaller_class_and_undecided_voters_to_the_adversary() -> None:
    class Fixed(nn.Module):
        """Part by part: logits from the part's only pixel, red for class 1, green for class 0."""

        def forward(self, x: Tensor) -> Tensor:
            return x[:, [1, 0], 0, 0]

    x = torch.zeros(2, 3, 2, 2)
    x[0, 0, 0], x[0, 1, 1] = 1, 1  # two votes each
    x[1, 0] = 1
    x[1, 1, 1, 1] = 1 - 1e-4  # three votes for class 1 and one that is all but tied
    defence = PixelPartition(Fixed().eval(), 2, 2)
    assert defence(x).argmax(1).tolist() == [0, 1]
    answer, radius = defence.certified_radius(x)
    assert answer.tolist() == [0, 1]
    assert radius.tolist() == [0, 0]
    strict = PixelPartition(Fixed().eval(), 2, 2, tolerance=0)
    assert strict.certified_radius(x)[1].tolist() == [0, 1]


def test_scores_are_finite_probabilities_that_move_while_the_answer_stands() -> None:
    class Sloped(nn.Module):
        """Class 0 or 1 by the mean of the view, steeply; NaN on views that are all black."""

        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            score = self.slope * (mean - 0.5)
            return torch.where((mean == 0)[:, None], math.nan, torch.stack([-score, score], 1))

    x = torch.rand(1, 3, 4, 4, generator=seeded(5)) * 0.2 + 0.6
    less = x - 0.05
    for slope in (1.0, 1e5):
        defence = PixelPartition(Sloped(slope).eval(), 2, 2)
        for image in (x, less, torch.zeros_like(x)):
            scores = defence(image)
            assert bool(scores.isfinite().all())
            torch.testing.assert_close(scores.exp().sum(1), torch.ones(1))
    defence = PixelPartition(Sloped(1.0).eval(), 2, 2)
    assert defence(x).argmax(1) == defence(less).argmax(1) == 1
    margins = [float(scores[0, 1] - scores[0, 0]) for scores in (defence(x), defence(less))]
    assert margins[0] > margins[1]
    nothing = torch.zeros_like(x)
    assert defence(nothing)[0].tolist() == pytest.approx([math.log((2 + 0.5) / 3), math.log(0.5 / 3)])
    assert [int(t) for t in defence.certified_radius(nothing)] == [0, -1]


def test_what_it_declares() -> None:
    net, x = Net(), torch.rand(4, 3, 8, 8, generator=seeded(6))
    defence = PixelPartition(net, 2, 3, views_per_pass=5)
    assert pixel_voting_of(defence) is defence
    assert pixel_voting_of(net) is None
    assert masked_voting_of(defence) is None
    assert (defence.parts, defence.grid) == (6, (2, 3))
    assert not is_stochastic(defence)
    net.stochastic = True  # type: ignore[assignment]
    assert is_stochastic(defence)
    surrogate = surrogate_of(defence)
    assert isinstance(surrogate, PartAverage)
    views = torch.stack([part_views(x, torch.full((4,), part), (2, 3)) for part in range(6)])
    torch.testing.assert_close(surrogate(x), torch.stack([net(v).softmax(1) for v in views]).mean(0).log())
    gradients = []
    for module in (surrogate, PartAverage(PixelPartition(net, 2, 3))):
        leaf = x.clone().requires_grad_(True)
        module(leaf)[:, 0].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])  # the recomputed passes are the same passes


def test_gradients_go_through_the_classifiers_own_stand_in() -> None:
    class Stepwise(Net):
        """Answers on rounded images, which have no gradient, and offers a smooth stand-in."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * 8).round() / 8)

        def differentiable_surrogate(self) -> nn.Module:
            return Net()

    leaf = torch.rand(2, 3, 8, 8, generator=seeded(7)).requires_grad_(True)
    surrogate = surrogate_of(PixelPartition(Stepwise(), 2, 2))
    assert surrogate is not None
    surrogate(leaf)[:, 0].sum().backward()
    assert leaf.grad is not None
    assert float((leaf.grad != 0).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "at least 1"),
        ({"views_per_pass": 0}, "at least 1"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ],
)
def test_unusable_settings_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        PixelPartition(Net(), **settings)
    assert "\n" not in str(caught.value)


def test_images_smaller_than_the_grid_are_refused() -> None:
    with pytest.raises(InputError, match="8x8 parts do not fit images of 8x7"):
        PixelPartition(Net(), 8, 8)(torch.rand(1, 3, 8, 7))
