"""Minimal-norm attacks against distances that are known: closed forms, linear programs, and planes within the box."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attack_toys import Linear, images, small_net
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from amsdn.attacks import CrossEntropy, Margin, fab
from amsdn.attacks.base import Attack, Victim
from amsdn.attacks.carlini_wagner import CWL2, Hinge, _Search
from amsdn.attacks.deepfool import DeepFool, shortest_step
from amsdn.attacks.fab import FABAttack, FABL1Attack, FABL2Attack, FABTargetedAttack, FABTargetedL2Attack
from amsdn.attacks.fab_norms import PlaneNorm
from amsdn.attacks.losses import MARGIN, Goal, margin
from amsdn.attacks.minimal_norm import SmallestSet, boundaries
from amsdn.errors import InputError
from amsdn.threats import L2Ball, LinfBall, SparsePixels

SIZE = 8


class Planes(nn.Module):
    """K classes, every logit linear in the image."""

    def __init__(self, classes: int = 5, seed: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        steep = torch.linspace(0.3, 2.0, classes).unsqueeze(1)  # the nearest boundary is not always that of the best rival
        self.w = nn.Parameter(steep * torch.randn(classes, 3 * SIZE**2, generator=generator))
        self.b = 2 * torch.randn(classes, generator=generator)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.w.T + self.b


def near_images(model: Linear, low: float = 0.3, high: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Six images of class 0 with a margin that a small change overcomes: x, y, margin."""
    x = images(60, SIZE, low=low, high=high)
    value = model(x)[:, 0].detach()
    near = value.gt(1).nonzero().squeeze(1)[:6]
    assert len(near) == 6
    return x[near], torch.zeros(6, dtype=torch.int64), value[near]


def dual(w: Tensor, norm: float) -> Tensor:
    """Per row, the norm by which a plane's offset is divided to give its distance in ``norm``."""
    return w.norm(p={1: math.inf, 2: 2, math.inf: 1}[norm], dim=-1)


# The inner images leave room for every optimum below, except for L1, which puts all it can into single pixels.
@pytest.mark.parametrize(
    ("attack", "norm", "slack"),
    [
        (FABAttack(math.inf, 20), math.inf, 1e-3),
        (FABL2Attack(math.inf, 20), 2, 1e-3),
        (FABTargetedAttack(math.inf, 20), math.inf, 1e-3),
        (FABTargetedL2Attack(math.inf, 20), 2, 1e-3),
        (CWL2(math.inf, 120, 8), 2, 0.01),
        (DeepFool(math.inf), 2, 0.0205),  # its overshoot
    ],
)
def test_smallest_change_of_a_linear_model(attack: Attack, norm: float, slack: float) -> None:
    model = Linear(SIZE, 10.0)
    x, y, value = near_images(model)
    result = attack(model, x, y)
    best = value / dual(model.w.detach().reshape(1, -1), norm)
    assert result.success.all()
    assert (result.spent >= best * (1 - 1e-4)).all()
    assert (result.spent <= best * (1 + slack) + 2e-4 * (type(attack) is DeepFool)).all(), result.spent / best


def planes_in_the_box(count: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random points [count,n] (many at the walls), normals (some entries zero) and gaps, half of which need the walls."""
    generator = torch.Generator().manual_seed(5)
    points = (torch.rand(count, n, generator=generator) * 1.6 - 0.3).clamp(0, 1)
    normals = torch.randn(count, n, generator=generator) * (torch.rand(count, n, generator=generator) > 0.2)
    normals[:, 0] += 0.1
    towards = torch.randn(count, generator=generator).sign()
    room = torch.where(towards.unsqueeze(1) * normals > 0, 1 - points, points)
    share = torch.rand(count, generator=generator) ** 0.5
    return points, normals, towards * share * (normals.abs() * room).sum(1)


def smallest_linf(point: np.ndarray, w: np.ndarray, gap: float) -> float:
    n = len(w)  # over (d, t): minimise t, |d_i| <= t, w.d = gap, the point stays in the box
    ones = np.ones((n, 1))
    both = np.block([[np.eye(n), -ones], [-np.eye(n), -ones]])
    bounds = [(-p, 1 - p) for p in point] + [(0, None)]
    solution = linprog([0] * n + [1], both, np.zeros(2 * n), np.r_[w, 0][None], [gap], bounds)
    assert solution.success
    return float(solution.fun)


def smallest_l1(point: np.ndarray, w: np.ndarray, gap: float) -> float:
    bounds = [(0, 1 - p) for p in point] + [(0, p) for p in point]  # up and down apart
    solution = linprog(np.ones(2 * len(w)), A_eq=np.r_[w, -w][None], b_eq=[gap], bounds=bounds)
    assert solution.success
    return float(solution.fun)


def smallest_l2(point: np.ndarray, w: np.ndarray, gap: float) -> float:
    bounds = [(-p, 1 - p) for p in point]
    start = np.array([high if gap * v > 0 else low for v, (low, high) in zip(w, bounds, strict=True)])
    plane = {"type": "eq", "fun": lambda d: w @ d - gap, "jac": lambda d: w}
    solution = minimize(lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=bounds, constraints=plane, method="SLSQP", tol=1e-12)
    assert solution.success
    return float(solution.fun**0.5)


NORMS = [
    pytest.param(FABAttack(), smallest_linf, id="linf"),
    pytest.param(FABL2Attack(), smallest_l2, id="l2"),
    pytest.param(FABL1Attack(), smallest_l1, id="l1"),
]


@pytest.mark.parametrize(("norm", "smallest"), NORMS)
def test_projection_onto_a_plane_within_the_box(norm: PlaneNorm, smallest: Callable[[np.ndarray, np.ndarray, float], float]) -> None:
    points, normals, gaps = planes_in_the_box(40, 7)
    change = norm.onto_plane(points, normals, gaps)
    torch.testing.assert_close((change * normals).sum(1), gaps, atol=2e-6, rtol=1e-5)
    assert ((points + change >= -1e-6) & (points + change <= 1 + 1e-6)).all()
    best = [smallest(p, w, float(g)) for p, w, g in zip(points.double().numpy(), normals.double().numpy(), gaps, strict=True)]
    torch.testing.assert_close(norm.length(change), torch.tensor(best).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("norm", "smallest"), NORMS)
def test_projection_where_there_is_none(norm: PlaneNorm, smallest: object) -> None:
    points, normals, gaps = planes_in_the_box(40, 7)
    corner = norm.onto_plane(points, normals, 1e4 * gaps.sign())
    wanted = torch.where(normals * gaps.sign().unsqueeze(1) > 0, 1.0, 0.0)
    assert torch.equal(torch.where(normals == 0, wanted, points + corner).round(decimals=5), wanted)
    assert (corner[normals == 0] == 0).all()
    assert (norm.onto_plane(points, torch.zeros_like(normals), gaps) == 0).all()
    assert (norm.onto_plane(points, normals, torch.zeros_like(gaps)) == 0).all()


@pytest.mark.parametrize("attack", [FABAttack(math.inf, 20), FABL2Attack(math.inf, 20), FABL1Attack(math.inf, 20)])
def test_fab_at_the_walls_of_the_box(attack: fab._FAB) -> None:
    model = Linear(SIZE, 10.0)
    x, y, value = near_images(model, low=-0.5, high=1.5)
    x = x.clamp(0, 1)
    value = model(x)[:, 0].detach()
    x, y, value = (t[value > 1] for t in (x, y, value))
    assert len(x) >= 3
    best = attack.length(attack.onto_plane(x.flatten(1), model.w.detach().reshape(1, -1).expand(len(x), -1), -value))
    result = attack(model, x, y)
    assert result.success.all()
    torch.testing.assert_close(result.spent, best, rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    ("attack", "norm", "slack"),
    [
        (FABAttack(math.inf, 20), math.inf, 0.002),
        (FABL2Attack(math.inf, 20), 2, 0.002),
        (FABTargetedAttack(math.inf, 10), math.inf, 0.002),
        (FABTargetedL2Attack(math.inf, 10), 2, 0.002),
        (CWL2(math.inf, 80, 6, learning_rate=0.003, initial_const=0.01), 2, 0.1),  # pushes the best rival, not the nearest
        (DeepFool(math.inf), 2, 0.03),
    ],
)
def test_nearest_of_several_boundaries(attack: Attack, norm: float, slack: float) -> None:
    model, x = Planes(), images(8, SIZE, low=0.4, high=0.6)
    logits = model(x).detach()
    y = logits.argmax(1)
    to_each = (logits.gather(1, y[:, None]) - logits) / dual(model.w.detach()[y].unsqueeze(1) - model.w.detach(), norm)
    best = to_each.scatter(1, y[:, None], torch.inf).amin(1)
    assert (to_each.scatter(1, y[:, None], torch.inf).argmin(1) != logits.scatter(1, y[:, None], -torch.inf).argmax(1)).any()
    result = attack(model, x, y)
    assert result.success.all()
    assert (result.spent <= best * (1 + slack) + 1e-4).all(), result.spent / best
    assert (result.spent >= best * (1 - 1e-3)).all()


def smallest_to_target(model: Planes, x: Tensor, target: int) -> float:
    """The Linf distance to where the target's logit is the largest, a linear program."""
    w, n = model.w.detach().double().numpy(), x.numel()
    others = [k for k in range(len(w)) if k != target]
    gap = (model(x.unsqueeze(0))[0].detach().double()).numpy()
    ones = np.ones((n, 1))
    rows = np.block([[np.eye(n), -ones], [-np.eye(n), -ones], [w[others] - w[target], np.zeros((len(others), 1))]])
    limits = np.r_[np.zeros(2 * n), gap[target] - gap[others]]
    box = [(-float(p), 1 - float(p)) for p in x.flatten()]
    return float(linprog([0] * n + [1], rows, limits, bounds=[*box, (0, None)]).fun)


@pytest.mark.parametrize("attack", [FABAttack(math.inf, 60), FABTargetedAttack(math.inf, 60)])
def test_towards_a_target(attack: Attack) -> None:
    model, x = Planes(), images(3, SIZE, low=0.4, high=0.6)
    y = model(x).argmax(1)
    targets = (y + 2) % 5
    result = attack(model, x, y, targets=targets)
    best = torch.tensor([smallest_to_target(model, image, int(t)) for image, t in zip(x, targets, strict=True)])
    assert result.success.all()
    assert (result.spent >= best * (1 - 1e-4)).all()
    assert (result.spent <= best * 1.1).all(), result.spent / best


@pytest.mark.parametrize("attack", [DeepFool(), CWL2(num_steps=40, binary_search_steps=4, initial_const=1.0)])
def test_l2_attacks_reach_targets(attack: Attack) -> None:
    model, x = Planes(), images(4, SIZE, low=0.4, high=0.6)
    y = model(x).argmax(1)
    targets = (y + 1) % 5
    result = attack(model, x, y, targets=targets)
    assert torch.equal(result.prediction[result.success], targets[result.success])
    assert result.success.float().mean() > 0.4


def test_deepfool_steps_just_across_the_nearest_plane() -> None:
    normals = torch.randn(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    normals[:, 2] *= 1e-30  # gradients of a confident model, whose squares vanish
    normals[:, 3] = 0
    lengths = normals.double().flatten(2).norm(dim=2)
    values = -lengths * torch.tensor([[1.0], [0.5], [2.0]]) + torch.tensor([0.0, 0.0, 0.0, -1.0])
    step = shortest_step(normals, values.float())
    assert (step[3] == 0).all()
    torch.testing.assert_close(step[:3].flatten(1).norm(dim=1), torch.full((3,), 0.5 + 1e-4))
    along = (step.double() * normals[1]).flatten(1).sum(1)[:3]
    torch.testing.assert_close(along, -values[1, :3] + 1e-4 * lengths[1, :3], rtol=1e-5, atol=0)


EVERY = [
    FABAttack(math.inf, 5),
    FABL2Attack(math.inf, 5),
    FABTargetedAttack(math.inf, 3),
    CWL2(math.inf, 12, 3, initial_const=1.0),
    DeepFool(math.inf),
]


@pytest.mark.parametrize("attack", EVERY)
def test_a_budget_ends_the_search_early_and_bounds_the_result(attack: Attack) -> None:
    net, x = small_net(), images(8)
    y = net(x).argmax(1)
    free = attack(net, x, y)
    assert free.success.all()
    budget = float(free.spent.median()) * 1.2
    settings = {f: getattr(attack, f) for f in attack.__dataclass_fields__ if f != "epsilon"}
    bounded = type(attack)(budget, **settings)(net, x, y)
    assert torch.equal(bounded.success, free.spent <= budget)
    assert (bounded.spent <= budget + 1e-5).all()
    torch.testing.assert_close(
        bounded.spent[~bounded.success], torch.tensor(budget).expand(int((~bounded.success).sum())), rtol=0.05, atol=0
    )
    assert (bounded.forwards <= free.forwards).all()
    assert bounded.forwards.sum() < free.forwards.sum() or type(attack) is DeepFool
    to_the_end = type(attack)(budget, **(settings | {"stop_when_fooled": False}))(net, x, y)
    assert torch.equal(to_the_end.success, bounded.success)
    torch.testing.assert_close(to_the_end.spent[bounded.success], free.spent[bounded.success])


@pytest.mark.parametrize("attack", EVERY)
def test_a_sample_does_not_depend_on_its_batch(attack: Attack) -> None:
    net, x = small_net(), images(4)
    y = net(x).argmax(1)
    together = attack(net, x, y)
    alone = [attack(net, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together.spent, torch.cat([r.spent for r in alone]), rtol=1e-3, atol=1e-6)
    assert torch.equal(together.forwards, torch.cat([r.forwards for r in alone]))


@pytest.mark.parametrize("attack", [FABAttack, FABTargetedL2Attack, CWL2, DeepFool])
def test_one_budget_for_each_image(attack: Callable[..., Attack]) -> None:
    net, x = small_net(), images(6)
    y = net(x).argmax(1)
    free = attack(math.inf, num_steps=10)(net, x, y).spent
    budgets = free * torch.tensor([1.1, 0.3] * 3)
    result = attack(budgets, num_steps=10)(net, x, y)
    assert torch.equal(result.success, torch.tensor([True, False] * 3))
    assert (result.spent <= budgets + 1e-5).all()


class Flat(nn.Module):
    """A model whose gradients are masked altogether."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[3.0, 1.0, 0.0]]).expand(len(x), -1) + 0 * x.flatten(1).round().sum(1, keepdim=True).detach()


@pytest.mark.parametrize(
    "attack", [FABAttack(n_restarts=2), FABL2Attack(math.inf, n_restarts=2), FABL1Attack(), CWL2(num_steps=3), DeepFool()]
)
def test_a_model_without_gradients(attack: Attack) -> None:
    result = attack(Flat().eval(), images(3), torch.zeros(3, dtype=torch.int64))
    assert not result.success.any()
    assert result.x_adv.isfinite().all()


def test_final_search_and_restarts_only_help() -> None:
    net, x = small_net(), images(8)
    y = net(x).argmax(1)
    rough, searched = (FABL2Attack(math.inf, 3, final_steps=n)(net, x, y) for n in (0, 3))
    assert (searched.spent <= rough.spent).all()
    assert searched.spent.sum() < 0.995 * rough.spent.sum()
    assert (searched.forwards == rough.forwards + 5).all()
    again = FABL2Attack(math.inf, 3, n_restarts=3, final_steps=0)(net, x, y)
    assert (again.spent <= rough.spent).all()
    assert (again.forwards - 1 == 3 * (rough.forwards - 1)).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_confidence_is_a_margin_of_logits(targeted: bool) -> None:
    model, x = Planes(), images(4, SIZE, low=0.4, high=0.6)
    y = model(x).argmax(1)
    targets = (y + 1) % 5 if targeted else None
    result = CWL2(math.inf, 60, 4, initial_const=1.0, confidence=3.0)(model, x, y, targets=targets)
    assert result.success.all()
    reached = -result.margin if targets is None else margin(model(result.x_adv), targets)
    assert (reached >= 3.0 - 1e-4).all()
    assert (reached <= 3.6).all()


def test_a_stalled_search_ends_early() -> None:
    model = Linear(SIZE, 10.0)
    x, y, value = near_images(model)
    result = CWL2(math.inf, 400, 2, learning_rate=0.02, initial_const=0.1)(model, x[:2], y[:2])
    assert (result.forwards < 1 + 2 * 400).all()
    torch.testing.assert_close(result.spent, value[:2] / model.w.detach().norm(), rtol=0.02, atol=0)


def test_hinge_and_its_demand_agree() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.arange(50) % 4
    for targeted in (False, True):
        goal, hinge = Goal(labels, targeted), Hinge(0.7)
        assert torch.equal(goal.reached(hinge.demand(logits, goal)), hinge(logits, goal) >= 0)
        torch.testing.assert_close(hinge(logits, goal), (Margin()(logits, goal) - 0.7).clamp(max=0))


def test_tanh_space_starts_at_the_image_and_stays_in_the_box() -> None:
    x = torch.linspace(0, 1, 48).reshape(1, 3, 4, 4)
    search = _Search.begin(x, 1.0)
    start, slope = search.images(x)
    assert torch.equal(start, x)
    assert (slope > 0).all()
    for step in (-30.0, -1.0, 1.0, 30.0):
        there, _ = _Search(search.origin, search.start, search.point + step, *list(vars(search).values())[3:]).images(x)
        assert ((there >= 0) & (there <= 1)).all()
        assert ((there - x) * step >= 0).all()
    restarted = search.descend(torch.ones_like(x), 0.01).restart(torch.tensor([True]))
    assert torch.equal(restarted.images(x)[0], x)
    assert (restarted.const, restarted.low, restarted.high) == (10, 1, math.inf)


def test_binary_search_brackets() -> None:
    search = _Search.begin(images(2), 1.0)
    both = torch.tensor([True, True])
    for found, const in (([False, True], [10.0, 0.5]), ([True, True], [5.5, 0.25]), ([False, False], [7.75, 0.375])):
        search.found.copy_(torch.tensor(found))
        search = search.restart(both)
        assert search.const.tolist() == const
    assert search.rounds.tolist() == [3, 3]


def test_targeted_fab_ranks_the_classes_once_and_carries_the_ranking_along() -> None:
    net, x = small_net(), images(12)
    y = net(x).argmax(1)
    order = net(x).argsort(dim=1, descending=True)[:, 1:]
    runs: list[tuple[int, int]] = []

    class Watched(FABTargetedAttack):
        def _walk(self, active: SmallestSet, ranking: Tensor | None, rank: int, x_adv: Tensor) -> Tensor | None:
            runs.append((rank, len(active)))
            assert ranking is not None
            assert torch.equal(ranking, order[active.victim.rows])
            return super()._walk(active, ranking, rank, x_adv)

    result = Watched(1e-4, 2)(net, x, y)
    assert runs == [(rank, 12) for rank in range(4)]
    assert (result.forwards == 1 + 1 + 4 * 2 * 2 + 5).all()  # the clean image, the ranking, four rivals, the final search
    runs.clear()
    some = Watched(0.006, 2)(net, x, y)
    assert 0 < some.success.sum() < len(x)
    assert 0 < runs[-1][1] < runs[0][1]  # samples left on the way


def test_several_gradients_from_one_forward() -> None:
    net, x = small_net(), images(3)
    goal = Goal(net(x).argmax(1))
    victim = Victim.of(net, 3, x.device)
    several, values, logits = victim.gradients(x, lambda z: torch.stack((Margin()(z, goal), CrossEntropy()(z, goal))))
    assert victim.forwards.tolist() == [1] * 3
    assert victim.backwards.tolist() == [2] * 3
    for i, loss in enumerate((Margin(), CrossEntropy())):
        gradient, value, one = victim.gradient(x, lambda z, loss=loss: loss(z, goal))  # type: ignore[misc]
        torch.testing.assert_close(several[i], gradient)
        torch.testing.assert_close(values[i], value)
        torch.testing.assert_close(logits, one)


def test_boundaries() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0], [2.0, 0.0, 1.0, 7.0]])
    assert boundaries(logits, Goal(torch.tensor([1, 0])), 2).tolist() == [[-1.0, 5.0], [-2.0, -1.0]]
    assert boundaries(logits, Goal(torch.tensor([1, 0])), 9).shape == (3, 2)
    assert boundaries(logits, Goal(torch.tensor([0, 3]), targeted=True), 9).tolist() == [[-4.0, 5.0]]


class TestSmallestSet:
    """Images of one grey level g; class 1 from g = 0.5 on. Clean images are black, so Linf distance is g."""

    class Level(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = x.flatten(1).mean(1)
            return torch.stack((0.5 - level, level - 0.5), 1)

    def grown(self, *levels: float) -> Tensor:
        return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()

    def record(self, kept: SmallestSet, *levels: float) -> Tensor | None:
        x_adv = self.grown(*levels)
        return kept.record(x_adv, *kept.query(x_adv, MARGIN))

    def make(self, eps: float | Tensor, count: int = 3, **settings: bool) -> SmallestSet:
        x, model = torch.zeros(count, 3, 2, 2), self.Level().eval()
        return SmallestSet(Victim.of(model, count, x.device), x, Goal(torch.zeros(count, dtype=torch.int64)), LinfBall(eps), **settings)

    def test_keeps_the_smallest_and_until_then_the_best(self) -> None:
        kept = self.make(math.inf)
        for levels in ((0.9, 0.1, 0.3), (0.6, 0.2, 0.1), (0.7, 0.8, 0.2), (0.4, 0.9, 0.0)):
            assert self.record(kept, *levels) is None
        torch.testing.assert_close(kept.distance, torch.tensor([0.6, 0.8, math.inf]))
        assert torch.equal(kept.best, self.grown(0.6, 0.8, 0.3))
        assert torch.equal(kept.result(), self.grown(0.6, 0.8, 0.3))

    def test_leaves_within_the_budget_and_projects_what_is_beyond(self) -> None:
        kept = self.make(0.65)
        stay = self.record(kept, 0.6, 0.7, 0.3)
        assert stay is not None
        assert stay.tolist() == [1, 2]
        assert self.record(kept, 0.9, 0.9) is None
        assert len(kept.distance) == len(kept) == 2
        assert torch.equal(kept.result(), self.grown(0.6, 0.65, 0.65))

    def test_nothing_leaves_without_drop_but_the_smallest_stays(self) -> None:
        kept = self.make(0.65, drop=False)
        for levels in ((0.6, 0.9, 0.3), (0.64, 0.55, 0.4), (0.52, 0.9, 0.45)):
            assert self.record(kept, *levels) is None
        assert torch.equal(kept.conclude(self.grown(0.51, 0.1, 0.2), MARGIN), self.grown(0.51, 0.55, 0.45))

    def test_settles_and_finished(self) -> None:
        stay = self.record(self.make(0.1, settles=True), 0.9, 0.3, 0.6)
        assert stay is not None
        assert stay.tolist() == [1]
        kept = self.make(math.inf)
        x_adv = self.grown(0.9, 0.3, 0.6)
        stay = kept.record(x_adv, *kept.query(x_adv, MARGIN), finished=torch.tensor([False, True, True]))
        assert stay is not None
        assert stay.tolist() == [0]
        assert torch.equal(kept.result(), x_adv)

    def test_a_finished_sample_is_left_alone_until_the_next_look(self) -> None:
        kept = self.make(0.65)
        kept.poll_every = 2
        assert self.record(kept, 0.6, 0.9, 0.9) is None
        stay = self.record(kept, 0.55, 0.5001, 0.8)
        assert stay is not None
        assert stay.tolist() == [2]
        assert torch.equal(kept.result(), self.grown(0.6, 0.5001, 0.65))

    def test_budgets_of_each_image_and_of_pixels(self) -> None:
        stay = self.record(self.make(torch.tensor([0.7, 0.5, math.inf])), 0.6, 0.6, 0.6)
        assert stay is not None
        assert stay.tolist() == [1, 2]
        x = torch.zeros(1, 3, 2, 2)
        kept = SmallestSet(Victim.of(self.Level().eval(), 1, x.device), x, Goal(torch.zeros(1, dtype=torch.int64)), SparsePixels(3))
        x_adv = torch.ones(1, 3, 2, 2)
        kept.record(x_adv, *kept.query(x_adv, MARGIN))
        assert kept.distance.tolist() == [4]
        assert len(kept) == 1


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (DeepFool, {"num_steps": 0}),
        (DeepFool, {"overshoot": -0.1}),
        (DeepFool, {"n_classes": 1}),
        (CWL2, {"learning_rate": 0.0}),
        (CWL2, {"binary_search_steps": 0}),
        (CWL2, {"confidence": -1.0}),
        (CWL2, {"initial_const": 0.0}),
        (FABAttack, {"n_restarts": 0}),
        (FABAttack, {"alpha_max": 0.0}),
        (FABAttack, {"eta": 0.9}),
        (FABAttack, {"beta": 1.1}),
        (FABAttack, {"final_steps": -1}),
        (FABAttack, {"n_classes": 1}),
        (FABTargetedAttack, {"n_targets": 0}),
    ],
)
def test_unusable_settings_are_refused(attack: Callable[..., Attack], settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        attack(**settings)


def test_an_unbounded_threat() -> None:
    x = images(3)
    for ball in (LinfBall(math.inf), L2Ball(math.inf), SparsePixels(torch.tensor(math.inf))):
        x_adv = images(3, seed=1)
        assert torch.equal(ball.project(x_adv, x), x_adv) or (ball.project(x_adv, x) - x_adv).abs().max() < 1e-6
        assert ball.contains(x_adv, x).all()
        assert ball.sample(x, torch.Generator().manual_seed(0)).isfinite().all()
    assert LinfBall(math.inf).describe() == "linf inf"
    assert SparsePixels(3).with_budget(math.inf).describe() == "sparse inf"
