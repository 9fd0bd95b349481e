"""Patch attacks against brute force over every place and colour, and the single steps of their searches."""

import dataclasses
import itertools

import pytest
import torch
from attack_toys import Linear, images, small_net
from torch import Tensor, nn

from amsdn.attacks import Attack, Goal, LaVAN, Margin, PatchPGD, PatchRS, Restarts, Victim, make_attack
from amsdn.attacks.losses import margin
from amsdn.attacks.patch_attacks import Size, best_colour_gain, cut, paste, sides
from amsdn.commands.attack import AttackOptions, split_attack
from amsdn.commands.options import parse
from amsdn.errors import InputError
from amsdn.records import config_hash
from amsdn.threats import PatchRectangles, PatchRegion, rectangle_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(shape: tuple[int, int], size: Size) -> Tensor:
    """Every corner at which a patch lies inside an image of this shape, [P,2]."""
    return torch.tensor(list(itertools.product(*(range(n - s + 1) for n, s in zip(shape, sides(size), strict=True)))))


# --- the known optimum ---


class Bent(nn.Module):
    """Three classes of a 4x4 image, not linear, with many local optima."""

    def __init__(self) -> None:
        super().__init__()
        g = seeded(5)
        self.inner, self.outer = torch.randn(48, 12, generator=g) / 3, torch.randn(12, 3, generator=g)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.inner).sin() @ self.outer + torch.tensor([12.0, 0.0, 0.0])


def worst_margin(net: nn.Module, image: Tensor, size: int) -> Tensor:
    """The least margin of class 0 over every place and every content in {0,1}^(3 size size)."""
    contents = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3 * size**2))).reshape(-1, 3, size, size)
    found = []
    for corner in places((4, 4), size):
        x = paste(image.expand(len(contents), -1, -1, -1), contents, corner.expand(len(contents), -1))
        found.append(margin(net(x), torch.zeros(len(x), dtype=torch.int64)).min())
    return torch.stack(found).min()


@pytest.mark.parametrize("size", [1, 2])
def test_brute_force_over_every_place_and_colour(size: int) -> None:
    net, x = Bent(), images(3, 4)
    y = torch.zeros(3, dtype=torch.int64)
    worst = torch.stack([worst_margin(net, image, size) for image in x])
    assert (worst > 0).all()  # nobody leaves early: every attack must go to the end
    searched = Restarts(PatchRS(size, 100), 20)(net, x, y).margin
    torch.testing.assert_close(searched, worst, atol=1e-4, rtol=0)  # the search stays at the same colours
    climbed = Restarts(PatchPGD(size, 60, 0.5, starts=16, last_alpha=0.02, loss=Margin()), 4)(net, x, y).margin
    assert (climbed <= worst + 1e-3).all()  # inner colours may be better still


def linear_optimum(model: Linear, x: Tensor, size: Size, count: int) -> Tensor:
    """How far the margin falls at most, by brute force over all sets of places, [B]."""
    gain = best_colour_gain(-model.w.detach().expand_as(x), x)
    corners = torch.stack([torch.stack(c) for c in itertools.combinations_with_replacement(places((8, 8), size), count)])
    masks = rectangle_mask(corners, *sides(size), x).flatten(1).float()  # [sets,64]
    return (gain.flatten(1) @ masks.T).amax(1)


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        (PatchPGD((2, 3), 1, 1.0, "never", candidates=400), 0.9999),
        (PatchPGD((3, 2), 1, 1.0, "never", candidates=400), 0.9999),
        (Restarts(PatchPGD(2, 12, 1.0, count=2, candidates=20, starts=4), 10), 0.99),
        (Restarts(PatchPGD((1, 3), 12, 1.0, "full", count=2, candidates=20, starts=4), 10), 0.99),
        (Restarts(PatchRS((2, 3), 300), 8), 0.8),
        (Restarts(PatchRS(2, 300, count=2), 8), 0.75),
    ],
)
def test_rectangles_and_several_patches_near_the_optimum_of_a_linear_model(attack: Attack, share: float) -> None:
    model, x = Linear(bias=60.0), images(6, 8)
    one = attack.attack if isinstance(attack, Restarts) else attack
    assert isinstance(one, PatchPGD | PatchRS)
    best = linear_optimum(model, x, one.size, one.count)
    result = attack(model, x, torch.zeros(6, dtype=torch.int64))
    reached = (model(x)[:, 0] - model(result.x_adv)[:, 0]).detach() / best
    assert (reached <= 1 + 1e-4).all()
    assert reached.mean() > share, reached


# --- shapes, threats, costs ---


@pytest.mark.parametrize("attack", [PatchPGD, PatchRS])
def test_one_square_is_a_patch_region_and_the_rest_are_rectangles(attack: type[PatchPGD] | type[PatchRS]) -> None:
    assert attack(5).threat == attack((5, 5)).threat == PatchRegion(5)
    assert attack(5, count=2).threat == PatchRectangles(5, 5, 2)
    assert attack((4, 8)).threat == PatchRectangles(4, 8)
    assert LaVAN((4, 8)).threat == PatchRectangles(4, 8)
    net, x = small_net(), images(5)
    y = net(x).argmax(1)
    for other in (attack((3, 7), 20), attack((2, 9), 20, count=3), attack((16, 1), 20, count=2)):
        result = other(net, x, y)
        assert (result.spent <= other.threat.budget).all()
        assert (result.spent[result.forwards > 1] > 0).all()
        with pytest.raises(InputError, match="does not fit images of 16x16"):
            attack((17, 2), 3)(net, x, y)


@pytest.mark.parametrize("settings", [{"size": (3, 0)}, {"count": 0}, {"size": (3,)}, {"size": 2.5}])
@pytest.mark.parametrize("name", ["patch-pgd", "patch-rs"])
def test_unusable_shapes_are_refused(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"must be (positive|at least 1|one whole number)"):
        make_attack(name, **settings)


def test_several_patches_are_pasted_in_order() -> None:
    x, content = images(4, 8), images(12, 8, seed=1)[:, :, :2, :5].unflatten(0, (4, 3))
    corner = torch.stack([PatchRectangles(2, 5).random_corners(x, seeded(s)).squeeze(1) for s in range(3)], 1)
    corner[0] = torch.tensor([[2, 1], [6, 3], [3, 3]])  # the third overlaps the first
    out = paste(x, content, corner)
    one_by_one = x
    for k in range(3):
        one_by_one = paste(one_by_one, content[:, k], corner[:, k])
    assert torch.equal(out, one_by_one)
    assert torch.equal(cut(out, corner, (2, 5))[:, 2], content[:, 2])
    assert torch.equal(cut(out, corner, (2, 5))[0, 1], content[0, 1])
    assert torch.equal(out.masked_fill(rectangle_mask(corner, 2, 5, x), 0), x.masked_fill(rectangle_mask(corner, 2, 5, x), 0))
    assert torch.equal(cut(x, corner[:, 1], (2, 5)), cut(x, corner, (2, 5))[:, 1])


@pytest.mark.parametrize("starts", [1, 2, 3, 8, 16, 40])
@pytest.mark.parametrize("steps", [1, 2, 6, 50, 100])
def test_a_race_spends_its_steps_and_halves_its_field(starts: int, steps: int) -> None:
    plan = PatchPGD(starts=starts, num_steps=steps)._rounds()
    racers = [r for r, _ in plan]
    assert sum(r * turns for r, turns in plan) == steps
    assert racers[0] == min(starts, steps)
    assert racers[-1] == 1
    assert all(b <= a // 2 for a, b in itertools.pairwise(racers))
    assert all(turns >= 1 for _, turns in plan[:-1])


@pytest.mark.parametrize(("settings", "forwards"), [({}, 48), ({"move": "full"}, 120), ({"move": "never"}, 24), ({"count": 3}, 48)])
def test_the_cost_of_a_race_is_that_of_one_start(settings: dict[str, object], forwards: int) -> None:
    net, x = small_net(), images(4)
    attack = make_attack("patch-pgd-plain", size=4, num_steps=24, starts=4, stop_when_fooled=False, **settings)
    result = attack(net, x, net(x).argmax(1))
    assert (result.forwards == 1 + forwards).all()  # one more for the clean image
    assert (result.backwards == 24).all()


def test_a_short_run_races_fewer_starts_however_it_came_about() -> None:
    long, short = PatchPGD.racing(4), PatchPGD.racing(4, 20)
    assert dataclasses.replace(long, num_steps=20) == short  # as the command line does
    assert (long._rounds()[0][0], short._rounds()[0][0], PatchPGD.racing(4, 2)._rounds()[0][0]) == (16, 3, 1)


def test_the_first_of_the_racing_starts_stands_in_the_middle() -> None:
    net, x = small_net(), images(3)
    attack = dataclasses.replace(PatchPGD.racing((4, 6), 24, count=2), stop_when_fooled=False)
    active = attack.active(Victim.of(net, 3, x.device), x, Goal(torch.zeros(3, dtype=torch.int64)))
    corners = attack._first_corners(active, torch.Generator().manual_seed(0))
    assert corners.shape == (4, 3, 2, 2)
    assert (corners[0, :, 0] == torch.tensor([6, 5])).all()
    assert len(corners[1:].flatten(0, 2).unique(dim=0)) > 6


class Spot(nn.Module):
    """Sees nothing but the four pixels in one corner of an image, and is fooled if those are bright."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, :, 6:, 6:].flatten(1).mean(1)
        return torch.stack([3.5 - 4 * bright, torch.zeros_like(bright)], 1)


def test_a_race_finds_the_only_place_that_works() -> None:
    net, x = Spot().eval(), torch.zeros(20, 3, 8, 8)
    y = torch.zeros(20, dtype=torch.int64)
    alone = PatchPGD(2, 200, 0.1, "never")(net, x, y)
    raced = PatchPGD(2, 200, 0.1, "never", starts=128)(net, x, y)  # 49 places: all 20 images miss it with probability .07 each
    assert alone.success.sum() <= 3
    assert raced.success.sum() >= 15


def test_racing_beats_one_start_at_the_same_cost() -> None:
    net, x = small_net(seed=3), images(24)
    y = net(x).argmax(1)
    alone = PatchPGD(3, 64, 0.1)(net, x, y)
    raced = PatchPGD(3, 64, 0.1, starts=8)(net, x, y)
    assert raced.success.sum() > alone.success.sum()
    assert raced.margin.mean() < alone.margin.mean()


def test_steps_shrink_from_alpha_to_last_alpha() -> None:
    attack = PatchPGD(5, 11, 0.4, last_alpha=0.1)
    assert [attack._alpha_at(s) for s in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.1])
    assert PatchPGD(5, 11, 0.4)._alpha_at(7) == 0.4


# --- LaVAN ---


def test_lavan_reaches_the_optimum_of_its_place_and_changes_nothing_else() -> None:
    model, x = Linear(), images(4, 8)
    result = LaVAN((2, 3), 400, 0.3, corner=(4, 5))(model, x, torch.zeros(4, dtype=torch.int64))
    at = torch.tensor([[[4, 5]]]).expand(4, -1, -1)
    gain = best_colour_gain(-model.w.detach().expand_as(x), x)
    best = (gain * rectangle_mask(at, 2, 3, x)).flatten(1).sum(1)
    torch.testing.assert_close((model(x) - model(result.x_adv))[:, 0].detach(), best, rtol=1e-4, atol=0)
    assert not ((result.x_adv != x) & ~rectangle_mask(at, 2, 3, x)).any()


def test_lavan_does_not_care_how_sure_the_model_is() -> None:
    class Sure(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.net, self.scale = small_net(), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    x = images(8)
    y = small_net()(x).argmax(1)
    plain, sure = (LaVAN(6, 20)(Sure(scale).eval(), x, y) for scale in (1.0, 2.0**12))
    assert torch.equal(plain.x_adv, sure.x_adv)  # softmax would be exactly 0 or 1 in the second
    assert plain.success.any()


def test_lavan_keeps_its_random_place_and_refuses_a_corner_outside() -> None:
    net, x = small_net(), images(20)
    y = net(x).argmax(1)
    short, long = (LaVAN(4, n, stop_when_fooled=False)(net, x, y) for n in (1, 30))
    both = torch.where(long.x_adv != x, long.x_adv, short.x_adv)
    assert PatchRegion(4).contains(both, x).all()
    assert long.margin.mean() < short.margin.mean()
    for corner in ((13, 0), (-1, 3)):
        with pytest.raises(InputError, match=r"4x4 patch at corner \(.*\) leaves images of 16x16"):
            LaVAN(4, 2, corner=corner)(net, x, y)


# --- Patch-RS, step by step ---


@pytest.mark.parametrize(
    ("query", "divisor"),
    [(1, 1), (10, 1), (11, 2), (50, 2), (51, 4), (201, 8), (501, 16), (1001, 32), (2001, 64), (4001, 128), (6001, 256), (8001, 512)],
)
def test_patch_rs_halves_its_window_as_published(query: int, divisor: int) -> None:
    side = int((0.4 / divisor) ** 0.5 * 60)
    assert PatchRS(size=60)._window(query) == (side, side)
    assert PatchRS(size=60, num_queries=1000)._window(query // 10)[0] >= side
    assert PatchRS(size=(60, 10))._window(query) == (side, max(int((0.4 / divisor) ** 0.5 * 10), 1))


def test_patch_rs_recolours_one_window_of_one_patch_in_one_colour() -> None:
    attack, x = PatchRS(size=(8, 6), count=3), images(64, 16)
    content, corner = attack.start(x, attack.threat, seeded())
    assert content.shape == (64, 3, 3, 8, 6)
    assert set(content.unique().tolist()) == {0.0, 1.0}
    for query in (1, 11, 51):
        new, same_corner = attack.propose((content, corner), query, x, seeded(query))
        assert torch.equal(same_corner, corner)
        changed = (new != content).any(2)  # [B,n,h,w]
        assert (changed.flatten(2).any(2).sum(1) <= 1).all()
        assert {int(k) for k in changed.flatten(2).any(2).nonzero()[:, 1]} == {0, 1, 2}
        height, width = attack._window(query)
        assert changed.any(3).sum(2).amax() <= height
        assert changed.any(2).sum(2).amax() <= width


def test_patch_rs_ends_with_other_colours_and_then_single_channels() -> None:
    attack, x = PatchRS(size=5, num_queries=10_000), images(200, 8)
    state = attack.start(x, attack.threat, seeded())
    fine = attack._fine_from()
    assert attack._window(51) == (1, 1)
    assert attack._window(50) == (2, 2)
    assert fine == 51 + (10_000 - 51) // 2
    for query, flips in ((fine - 2, {1, 2, 3}), (fine + 1, {1})):
        new, _ = attack.propose(state, query, x, seeded(query))
        changed = (new != state[0]).squeeze(1)
        assert (changed.any(1).flatten(1).sum(1) == 1).all()  # one pixel, always really another colour
        assert set(changed.flatten(1).sum(1).tolist()) == flips
    assert PatchRS(size=1, num_queries=100)._fine_from() == 50


def test_patch_rs_shifts_every_fourth_query_and_ever_less() -> None:
    attack, x = PatchRS(size=(4, 6), num_queries=1000, count=2), images(64, 32)
    content, corner = attack.start(x, attack.threat, seeded())
    for query, reach in ((4, 23), (500, 12), (996, 1)):
        new_content, new_corner = attack.propose((content, corner), query, x, seeded(query))
        assert torch.equal(new_content, content)
        moved = (new_corner != corner).any(2)
        assert moved.any(0).all()
        assert (moved.sum(1) <= 1).all()
        assert (new_corner - corner).abs().max() <= reach
        assert (new_corner >= 0).all()
        assert (new_corner <= torch.tensor([28, 26])).all()


# --- the command line ---


@pytest.mark.parametrize(("given", "size"), [(["8"], 8), (["4", "12"], (4, 12))])
@pytest.mark.parametrize("name", ["patch-pgd", "patch-pgd-full", "patch-rs", "lavan"])
def test_a_size_is_one_number_or_two(name: str, given: list[str], size: Size) -> None:
    name, rest = split_attack([name, "--attack.size", *given, "--model", "here"])
    options = parse(AttackOptions(attack=make_attack(name)), rest, "attack", "")
    assert options.attack == make_attack(name, size=size)
    assert config_hash(options.attack) != config_hash(make_attack(name))
