"""Square: its moves, one by one, and the optimum of a linear model."""

import pytest
import torch
from attack_toys import Linear, images, small_net
from torch import Tensor

from amsdn.attacks import APGDAttack, PGDAttack
from amsdn.attacks.losses import CROSS_ENTROPY, MARGIN, Goal
from amsdn.attacks.square_attack import MarginOrCrossEntropy, SquareAttack, SquareL2Attack, _peak, _pulses
from amsdn.errors import InputError
from amsdn.threats import norm_balls


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inner(count: int, size: int = 16) -> Tensor:
    return images(count, size, low=0.3, high=0.7)  # the balls below stay clear of the walls of the box


def changed(a: Tensor, b: Tensor) -> Tensor:
    """[B,H,W] bool: where any channel differs by more than rounding."""
    return ((a - b).abs() > 1e-6).any(1)


def bounds(hit: Tensor) -> tuple[int, int]:
    """Height and width of what is hit in [H,W]."""
    rows, columns = hit.any(1).nonzero(), hit.any(0).nonzero()
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


@pytest.mark.parametrize("attack", [SquareAttack(), SquareL2Attack()])
def test_window_sides_follow_the_schedule(attack: SquareAttack, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(type(attack), "_change", lambda self, x_adv, x, eps, side, generator: seen.append(side) or x_adv)
    x = images(1, 32)
    state = attack.start(x, attack.threat, seeded())
    for step in (0, 10, 12, 50, 52, 200, 202, 502, 1002, 2002, 4002, 6002, 8002):  # of 10,000, counted from 0: a halving comes after 10
        attack.propose(state, 1 + step // 2, x, seeded())
    assert seen == [29, 29, 20, 20, 14, 14, 10, 7, 5, 4, 3, 2, 1]


def test_linf_starts_with_stripes() -> None:
    x, eps = inner(5), 0.1
    attack = SquareAttack(eps)
    delta = attack.start(x, attack.threat, seeded())[0] - x
    assert torch.equal(delta.abs().round(decimals=5), torch.full_like(x, eps))
    assert (changed(delta, delta[:, :, :1].expand_as(delta)) == 0).all()  # the same in every row
    assert len(delta[:, :, 0].round(decimals=3).flatten(1).unique(dim=0)) == 5  # another one for each sample


@pytest.mark.parametrize("side", [1, 5, 16])
def test_linf_move_is_one_square_at_the_budget(side: int) -> None:
    x, eps = inner(200), torch.full((200, 1, 1, 1), 0.1)
    attack, generator = SquareAttack(0.1), seeded()
    before = attack.start(x, attack.threat, generator)[0]
    flat = x + 0.1  # every pixel of every channel up: one proposal in eight would change nothing
    for start in (before, flat):
        after = attack._change(start, x, eps, side, generator)
        torch.testing.assert_close((after - x).abs(), torch.full_like(x, 0.1))
        hit = changed(after, start)
        assert hit.any((1, 2)).all()
        for h in hit[:40]:
            assert max(bounds(h)) <= side
    colours = (after - x)[hit.unsqueeze(1).expand(-1, 3, -1, -1)].sign()
    assert colours.min() < 0
    patterns = ((after - x) * hit.unsqueeze(1)).sign().flatten(2).amin(2) + 2 * ((after - x) * hit.unsqueeze(1)).sign().flatten(2).amax(2)
    assert len(patterns.unique(dim=0)) == 7  # all colours but the one that is there


def test_windows_reach_every_pixel_and_differ_between_samples() -> None:
    x, eps = inner(2000, 8), torch.full((2000, 1, 1, 1), 0.1)
    hit = changed(SquareAttack(0.1)._change(x + 0.1, x, eps, 3, seeded()), x + 0.1)
    assert hit.any(0).all()
    corner = hit[:, 0, 0].float().mean()
    torch.testing.assert_close(hit[:, -1, -1].float().mean(), corner, atol=0.02, rtol=0)
    torch.testing.assert_close(corner, torch.tensor(1 / 36), atol=0.015, rtol=0)
    assert len(hit.flatten(1).unique(dim=0)) == 36


def test_peak_by_the_paper() -> None:
    """Equation 2 of the paper, written as its loop over nested rectangles."""
    for height, width in ((1, 3), (2, 5), (3, 6), (4, 9)):
        wanted = torch.zeros(height, width)
        for k in range(max(height, width) // 2 + 1):
            top, left = height // 2 - k, width // 2 - k
            wanted[max(top, 0) : height // 2 + k + 1, max(left, 0) : width // 2 + k + 1] += 1 / (k + 1) ** 2
        torch.testing.assert_close(_peak(height, width, wanted), wanted / wanted.norm())


def test_pulses_have_unit_length_both_signs_and_both_directions() -> None:
    pulses = _pulses((200, 3), 5, images(1), seeded())
    torch.testing.assert_close(pulses.square().sum((2, 3)), torch.ones(200, 3))
    assert len(pulses.flatten(2).reshape(600, 25).unique(dim=0)) == 4
    turned = (pulses[:, :, 0, 2] * pulses[:, :, 4, 2]) > 0
    assert torch.equal(turned, turned[:, :1].expand(-1, 3))  # all channels of a window alike
    assert 60 < turned[:, 0].sum() < 140


def test_l2_start_fills_the_ball() -> None:
    for size in (3, 8, 16, 32):
        x = inner(3, size)
        attack = SquareL2Attack(0.5)
        delta = attack.start(x, attack.threat, seeded())[0] - x
        torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((3,), 0.5), rtol=1e-4, atol=0)
        assert (delta != 0).any(1).float().mean() > 0.8


@pytest.mark.parametrize("side", [2, 3, 8, 16])
def test_l2_move_shifts_mass_between_two_windows(side: int) -> None:
    x, eps = inner(60), torch.full((60, 1, 1, 1), 0.5)
    attack, generator = SquareL2Attack(0.5), seeded()
    before = attack.start(x, attack.threat, generator)[0]
    after = attack._change(before, x, eps, side, generator)
    torch.testing.assert_close((after - x).flatten(1).norm(dim=1), torch.full((60,), 0.5), rtol=1e-4, atol=0)
    hit = changed(after, before)
    assert hit.any((1, 2)).all()
    odd = {2: 3, 3: 3, 8: 9, 16: 15}[side]
    assert hit.flatten(1).sum(1).max() <= 2 * odd**2
    if side <= 3:
        assert hit.float().mean() < 0.1
        empty = (after == x).all(1) & hit  # the window that gave its mass away
        assert empty.any((1, 2)).float().mean() > 0.9


def test_l2_move_takes_up_what_the_box_cut_off() -> None:
    x, eps = inner(20), torch.full((20, 1, 1, 1), 0.5)
    short = x + (SquareL2Attack(0.3).start(x, SquareL2Attack(0.3).threat, seeded())[0] - x)
    after = SquareL2Attack(0.5)._change(short, x, eps, 3, seeded())
    torch.testing.assert_close((after - x).flatten(1).norm(dim=1), torch.full((20,), 0.5), rtol=1e-4, atol=0)
    assert changed(after, short).flatten(1).sum(1).max() <= 18  # all of it went into the window


@pytest.mark.parametrize("num_queries", [199, 200])
def test_l2_window_receives_each_channels_length_or_with_few_queries_that_of_all(num_queries: int) -> None:
    """One move on a perturbation even over the image; what is outside of both windows shrinks by one factor, if at all."""
    x, eps = inner(40, 12), torch.full((40, 1, 1, 1), 0.5)
    attack = SquareL2Attack(0.5, num_queries)
    weights = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1).expand_as(x)
    delta = weights * 0.5 / weights[0].norm()  # squared lengths of the channels as 1 : 4 : 16, even over the image
    after = attack._change(x + delta, x, eps, 5, seeded()) - x
    kept = (after / delta).flatten(2)
    factor = kept[:, 2].median(dim=1).values  # over half of the pixels are in neither window
    outside = ((after / delta - factor.reshape(-1, 1, 1, 1)).abs() < 1e-4).all(1, keepdim=True)
    assert outside.flatten(1).sum(1).min() >= 12**2 - 2 * 25
    inside = torch.where(outside, 0, after).square().sum((2, 3)) / factor.square().unsqueeze(1)
    before = torch.where(outside, 0, delta).square().sum((2, 3))
    wanted = before.sum(1, keepdim=True).expand_as(before) if num_queries < 200 else before
    torch.testing.assert_close(inside, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("attack", "share"), [(SquareAttack(0.1, 2000), 0.97), (SquareL2Attack(0.5, 800), 0.45)])
def test_near_the_optimum_of_a_linear_model(attack: SquareAttack | SquareL2Attack, share: float) -> None:
    model, x = Linear(8), images(6, 8, low=0.3, high=0.7)
    result = attack(model, x, torch.zeros(6, dtype=torch.int64))
    w = model.w.detach()
    best = attack.epsilon * (w.abs().sum() if isinstance(attack, SquareAttack) else w.norm())
    reached = (model(x)[:, 0] - model(result.x_adv)[:, 0]).detach() / best
    assert (reached <= 1 + 1e-4).all()
    assert reached.mean() > share, reached
    assert (result.forwards == 1 + attack.num_queries).all()
    assert (result.backwards == 0).all()


@pytest.mark.parametrize("attack", [SquareAttack, SquareL2Attack])
def test_one_budget_for_each_image(attack: type[SquareAttack]) -> None:
    net, x = small_net(), inner(6)
    y = net(x).argmax(1)
    budgets = torch.tensor([0.001, 0.002, 0.2, 0.003, 0.004, 0.3])
    result = attack(budgets, num_queries=30, stop_when_fooled=True)(net, x, y)
    torch.testing.assert_close(result.spent, budgets, rtol=0.01, atol=0)


def test_loss_by_goal() -> None:
    logits = torch.randn(4, 3, generator=seeded())
    labels = torch.tensor([0, 1, 2, 0])
    for targeted, loss in ((False, MARGIN), (True, CROSS_ENTROPY)):
        goal = Goal(labels, targeted)
        assert torch.equal(MarginOrCrossEntropy()(logits, goal), loss(logits, goal))


@pytest.mark.parametrize("settings", [{"num_queries": 0}, {"alpha_init": 0.0}, {"alpha_init": 1.1}, {"epsilon": 0.0}])
def test_unusable_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))[:3]):
        SquareAttack(**settings)  # type: ignore[arg-type]


def test_images_that_are_not_square() -> None:
    x = images(2, 16)[:, :, :9]
    for attack in (SquareAttack(0.1), SquareL2Attack(0.5)):
        state = attack.start(x, attack.threat, seeded())
        for query in (1, 50, 4000):
            state = attack.propose(state, query, x, seeded())
            assert attack.threat.contains(attack.render(state, x), x).all()


def test_a_query_does_not_look_at_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    x, looks = inner(4), []
    attack = SquareAttack(torch.tensor([0.05, 0.1, 0.1, 0.2]))  # type: ignore[arg-type]
    state = attack.start(x, attack.threat, seeded())
    number = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: looks.append(self) or number(self))
    (x_adv, _) = attack.propose(state, 5, x, seeded())
    assert not looks
    monkeypatch.undo()
    assert attack.threat.contains(x_adv, x).all()


def test_budgets_per_image_have_no_cost_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, checked = small_net(), images(4), []
    y, check = net(x).argmax(1), norm_balls.require_positive
    monkeypatch.setattr(norm_balls, "require_positive", lambda *args: checked.append(args) or check(*args))
    for make in (SquareAttack, SquareL2Attack, PGDAttack, APGDAttack):
        epsilon, counts = torch.full((4,), 1e-3), []
        for steps in (3, 9):
            attack = make(epsilon, **{"num_steps" if make in (PGDAttack, APGDAttack) else "num_queries": steps})
            checked.clear()
            attack(net, x, y)
            counts.append(len(checked))
        assert counts[0] == counts[1]
