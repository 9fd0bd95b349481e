"""Auto-PGD against plain loops that follow the papers for one image, known optima, and its promises about cost."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from attack_toys import Gate, Linear, gate_images, images, small_net
from ball_optima import best_gain
from torch import Tensor, nn

from amsdn.attacks import (
    DLR,
    APGDAttack,
    APGDL1Attack,
    APGDL2Attack,
    APGDTargetedAttack,
    APGDTargetedL1Attack,
    APGDTargetedL2Attack,
    Attack,
    CrossEntropy,
    Goal,
    Loss,
    Margin,
    PGDAttack,
    make_attack,
)
from amsdn.attacks.apgd import checkpoints, sparse_sign
from amsdn.attacks.losses import CROSS_ENTROPY, DLR_OR_MARGIN, MARGIN, TARGETED_DLR, Towards
from amsdn.errors import InputError

AWAY = torch.zeros(6, dtype=torch.int64)
HALVING = (APGDAttack(0.03, 40), APGDL2Attack(0.6, 40), APGDAttack(0.03, 40, loss=DLR()), APGDL2Attack(0.6, 30, rho=0.9))
SPARSE = (APGDL1Attack(4.0, 30, widen=False), APGDL1Attack(4.0, 60), APGDL1Attack(4.0, 30, loss=DLR()))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Waves(nn.Module):
    """Four classes whose logits oscillate, so that a step that is too long overshoots. Float64 within, so that an image
    has the same gradient in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(3 * 8 * 8, 4, generator=seeded(5)).double()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = (x.double() - 0.5).flatten(1) @ self.w
        return ((z * 1.5).sin() * 3 + 0.3 * z + torch.tensor([9.0, 0, 0, 0])).float()


def loss_and_gradient(net: nn.Module, loss: Loss, point: Tensor) -> tuple[float, Tensor]:
    leaf = point.clone().requires_grad_(True)
    value = loss(net(leaf), Goal(AWAY[:1]))
    value.sum().backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


def plain_halving(attack: Any, net: nn.Module, x: Tensor, start: Tensor, seen: Counter[str]) -> Tensor:
    """Algorithm 1 of Croce & Hein (2020) for one image x [1,3,H,W], written as the paper writes it."""
    n, ball, rho = attack.num_steps, attack.threat, attack.rho
    w, window = [0, int(0.22 * n)], int(0.22 * n)
    while w[-1] < n:
        window = max(window - max(int(0.03 * n), 1), int(0.06 * n))
        w.append(w[-1] + window)
    step, points, losses = 2 * attack.epsilon, [start], []
    f, g = loss_and_gradient(net, attack.loss, start)
    losses.append(f)
    best, best_loss, best_g = start, f, g
    steps_at, best_at = [step], [best_loss]  # eta and f_max at w_0
    since: list[bool] = []
    for k in range(n):
        here, before = points[-1], points[-2] if k else points[-1]
        z = ball.project(here + step * ball.steepest(g), x)
        new = z if k == 0 else ball.project(here + 0.75 * (z - here) + 0.25 * (here - before), x)
        f, g = loss_and_gradient(net, attack.loss, new)
        since.append(f > losses[-1])
        points.append(new)
        losses.append(f)
        if f > best_loss:
            best, best_loss, best_g = new, f, g
        if k + 1 in w and k + 1 < n:
            j = w.index(k + 1)
            first = sum(since) <= rho * (w[j] - w[j - 1])
            second = j > 1 and steps_at[-1] == steps_at[-2] and best_at[-1] == best_loss
            seen.update({"first": first, "second": second and not first, "neither": not first and not second})
            if first or second:
                step, points[-1], losses[-1], g = step / 2, best, best_loss, best_g
            steps_at.append(step)
            best_at.append(best_loss)
            since = []
    return best


def plain_sparse(attack: Any, net: nn.Module, x: Tensor, noise: Tensor, seen: Counter[str]) -> Tensor:
    """Algorithm 1 of Croce & Hein (2021) for one image, ball after ball."""
    start, n = x + noise, x.numel()
    for i, (factor, steps) in enumerate(attack.phases()):
        eps = factor * attack.epsilon
        ball = attack.threat.with_budget(eps)
        here = ball.project(start, x)
        support = n if i == 0 else int((here != x).sum())
        count, step = (0.2 * n if i == 0 else support / 1.5), eps
        best, best_loss = here, -torch.inf
        for k in range(steps + 1):
            f, g = loss_and_gradient(net, attack.loss, here)
            if f > best_loss:
                best, best_loss, best_g = here, f, g
            if k == steps:
                break
            if k and k % max(int(0.04 * steps), 1) == 0:
                now = int((best != x).sum())
                if now / support < 0.95:
                    step, here, g = eps, best, best_g
                else:
                    step = max(step / 1.5, eps / 10)
                seen.update({"shrunk": now / support < 0.95, "smallest": step == eps / 10})
                support, count = now, now / 1.5
            chosen = g.abs().flatten().argsort(descending=True)[: max(1, -int(-count // 1))]
            move = torch.zeros(n)
            move[chosen] = g.flatten()[chosen].sign() / len(chosen)
            here = ball.project(here + step * move.reshape(x.shape), x)
        start = best
    return start


@pytest.mark.parametrize("attack", HALVING)
def test_each_sample_follows_the_algorithm_as_written_for_one(attack: Any) -> None:
    net, x = Waves(), images(6, 8)
    seen: Counter[str] = Counter()
    start = attack.threat.sample(x, seeded(3))
    expected = [plain_halving(attack, net, x[i : i + 1], start[i : i + 1], seen) for i in range(6)]
    found = torch.cat(expected)
    kept = type(attack)(**{**vars(attack), "stop_when_fooled": False}).craft(net, x, AWAY, seeded(3))
    torch.testing.assert_close(kept, found, atol=1e-5, rtol=0)
    assert min(seen["first"], seen["neither"]) > 0, seen


def test_the_second_condition_also_halves() -> None:
    seen: Counter[str] = Counter()
    attack = APGDAttack(0.03, 60, rho=0.0, stop_when_fooled=False)
    x, net = images(6, 8), Waves()
    start = attack.threat.sample(x, seeded(4))
    found = torch.cat([plain_halving(attack, net, x[i : i + 1], start[i : i + 1], seen) for i in range(6)])
    torch.testing.assert_close(attack.craft(net, x, AWAY, seeded(4)), found, atol=1e-5, rtol=0)
    assert seen["second"] > 0, seen


@pytest.mark.parametrize("attack", SPARSE)
def test_each_sample_follows_the_sparse_algorithm_as_written_for_one(attack: Any) -> None:
    net, x = Waves(), images(6, 8)
    seen: Counter[str] = Counter()
    noise = torch.randn(x.shape, generator=seeded(3))
    found = torch.cat([plain_sparse(attack, net, x[i : i + 1], noise[i : i + 1], seen) for i in range(6)])
    kept = type(attack)(**{**vars(attack), "stop_when_fooled": False}).craft(net, x, AWAY, seeded(3))
    torch.testing.assert_close(kept, found, atol=1e-5, rtol=0)
    assert min(seen["shrunk"], seen["smallest"]) > 0, seen


@pytest.mark.parametrize("poll", [1, 3])
def test_a_sample_is_served_the_same_whoever_leaves(poll: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amsdn.attacks.base._poll_every", lambda device: poll)
    net, x = Waves(), images(32, 8)
    y = torch.zeros(32, dtype=torch.int64)
    for attack in (APGDAttack(0.03, 30, loss=DLR()), APGDL2Attack(0.5, 30), APGDL1Attack(6.0, 30)):
        stopped = attack(net, x, y, generator=seeded())
        watched = type(attack)(**{**vars(attack), "stop_when_fooled": False})(net, x, y, generator=seeded())
        assert 0 < stopped.success.sum() < len(x)
        assert (watched.forwards == watched.forwards[0]).all()
        standing = ~stopped.success
        torch.testing.assert_close(stopped.x_adv[standing], watched.x_adv[standing], atol=1e-4, rtol=0)
        assert (stopped.forwards[standing] == watched.forwards[0]).all()
        assert (stopped.forwards[stopped.success] < watched.forwards[0]).all() or poll > 1


def test_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    assert list(checkpoints(100)) == [round(100 * q) for q in p[1:-1]]
    for n in (1, 2, 3, 7, 50, 333):
        assert sum(checkpoints(n).values()) == max(checkpoints(n), default=0) < n


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        (APGDAttack(0.1, 20), 0.999999),
        (APGDAttack(torch.tensor([0.02, 0.1, 0.2, 0.05, 0.1, 0.3]), 20), 0.999999),  # type: ignore[arg-type]
        (APGDAttack(0.1, 20, loss=Margin()), 0.999999),
        (APGDL2Attack(0.5, 50), 0.995),  # a ball projection, then a clamp: what the walls cut off is not all spent elsewhere
        (APGDL1Attack(4.0, 100), 0.985),
        (APGDL1Attack(torch.tensor([2.0, 4, 8, 3, 5, 6]), 100, widen=False), 0.98),  # type: ignore[arg-type]
    ],
)
def test_optimum_of_a_linear_model_with_the_walls_of_the_box(attack: Any, share: float) -> None:
    model, x = Linear(bias=80.0), images(6, 8)
    result = attack(model, x, AWAY)
    reached = (model(x)[:, 0] - model(result.x_adv)[:, 0]).detach() / best_gain(attack.threat, -model.w.detach(), x)
    assert (reached <= 1 + 1e-5).all()
    assert reached.min() > share, reached


def test_beats_pgd_of_as_many_steps_where_the_step_size_matters() -> None:
    net, x = Waves(), images(64, 8)
    y = torch.zeros(64, dtype=torch.int64)
    for loss in (CrossEntropy(), DLR()):
        ours = APGDAttack(0.01, 40, loss=loss)(net, x, y).margin.mean()
        for alpha in (0.0025, 0.001):
            assert ours < PGDAttack(0.01, alpha, 40, loss=loss)(net, x, y).margin.mean()


def hard() -> tuple[nn.Module, Tensor, Tensor]:
    """Bright images of the gate: none can be fooled."""
    net, x = Gate(), gate_images()[8:]
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize(
    ("attack", "forwards", "backwards"),
    [
        (APGDAttack(num_steps=7), 7 + 1, 7),
        (APGDL2Attack(num_steps=7, loss=DLR()), 7 + 1, 7),
        (APGDL1Attack(1.0, 10), 10 + 3, 10),
        (APGDL1Attack(1.0, 10, widen=False), 10 + 1, 10),
        (APGDL1Attack(1.0, 1), 1 + 1, 1),
        (APGDTargetedAttack(num_steps=7), 1 + 2 * (7 + 1), 14),  # three classes: two targets, and one forward to rank them
        (APGDTargetedL2Attack(num_steps=7, n_targets=1), 1 + 7 + 1, 7),
        (APGDTargetedL1Attack(1.0, 10), 1 + 2 * (10 + 3), 20),
    ],
)
def test_cost_per_image_is_as_documented(attack: Attack, forwards: int, backwards: int) -> None:
    net, x, y = hard()
    result = attack(net, x, y)
    assert not result.success.any()
    assert (result.forwards == 1 + forwards).all()  # one more for the clean image
    assert (result.backwards == backwards).all()


def test_only_the_true_ball_is_recorded() -> None:
    net, x = Waves(), images(16, 8)
    y = net(x).argmax(1)
    for stop in (True, False):
        attack = APGDL1Attack(0.5, 20, stop_when_fooled=stop)
        assert attack.phases() == [(3.0, 6), (2.0, 6), (1.0, 8)]
        result = attack(net, x, y)  # ThreatViolation if a point of a wider ball came out
        assert result.spent.max() <= 0.5 + 1e-5
        assert result.spent.min() > 0.4
    assert [steps for _, steps in APGDL1Attack(num_steps=2).phases()] == [2]


class Hidden(nn.Module):
    """Five classes. The runner-up never wins, and the untargeted losses see only it; the class ranked fourth can win."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(3, 8, 8, generator=seeded(1)) * 0.1
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = ((x - 0.5) * self.w).flatten(1).sum(1)
        near = 0.95 - 0.5 * (1 + (5 * z).tanh()) * 0.1  # below 1 for every z, and falling where the fourth class rises
        return torch.stack([torch.ones_like(z), near, 0.0 * z + 0.5, 40 * z - 2.0, 0.0 * z - 3.0], 1)


def test_target_classes_are_tried_in_the_order_of_the_clean_logits() -> None:
    net, x = Hidden(), torch.full((2, 3, 8, 8), 0.5)
    y = torch.zeros(2, dtype=torch.int64)
    assert not APGDAttack(0.02, 20, loss=Margin())(net, x, y).success.any()
    assert not APGDTargetedAttack(0.02, 20, n_targets=2)(net, x, y).success.any()
    found = APGDTargetedAttack(0.02, 20, n_targets=3)(net, x, y)
    assert found.success.all()
    assert (found.prediction == 3).all()
    assert (found.forwards > 1 + 1 + 2 * 21).all()
    one = APGDTargetedAttack(0.02, 20)(net, x, y, targets=y + 3)  # a goal of its own: no other class is tried
    assert one.success.all()
    assert (one.forwards <= 1 + 21).all()


def test_any_misclassification_ends_the_search_for_a_target() -> None:
    net, x = small_net(5), images(8)
    y = net(x).argmax(1)
    result = APGDTargetedAttack(0.1, 20)(net, x, y)
    assert result.success.any()
    won = result.success
    assert torch.equal(net(result.x_adv).argmax(1)[won] != y[won], won[won])
    stood = APGDTargetedAttack(1e-4, 5)(net, x, y)
    assert (stood.forwards[~stood.success] == 1 + 1 + 4 * 6).all()


@pytest.mark.parametrize("kind", [APGDTargetedAttack, APGDTargetedL2Attack, APGDTargetedL1Attack])
@pytest.mark.parametrize("loss", [CROSS_ENTROPY, MARGIN, DLR_OR_MARGIN])
def test_a_loss_that_is_blind_to_the_tried_class_is_refused(kind: Any, loss: Loss) -> None:
    with pytest.raises(InputError, match="loss must depend on the class that is tried") as e:
        kind(loss=loss)
    assert "\n" not in str(e.value)
    kind(loss=TARGETED_DLR)


def test_losses_say_whether_they_see_the_tried_class() -> None:
    logits = torch.tensor([[2.0, 1.0, -0.5, 0.3, 0.1]])
    goal = Towards.likeliest(Goal(torch.tensor([0])), logits, 2)
    other = dataclasses.replace(goal, rank=1)
    for loss in (CROSS_ENTROPY, MARGIN, DLR_OR_MARGIN, TARGETED_DLR):
        assert loss.tells_classes == (not torch.equal(loss(logits, goal), loss(logits, other)))


def test_targeted_dlr_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -2.0], [0.0, 5.0, 2.0, 4.0]])
    goal = Goal(torch.tensor([0, 1]))
    towards = Towards.likeliest(goal, logits, 9)
    assert towards.order.tolist() == [[1, 2, 3], [3, 2, 0]]
    torch.testing.assert_close(TARGETED_DLR(logits, towards), torch.tensor([-2 / 4, -1 / 4]))
    second = Towards(goal.labels, within=goal, order=towards.order, rank=1).select(torch.tensor([1]))
    torch.testing.assert_close(TARGETED_DLR(logits[1:], second), torch.tensor([-3 / 4]))
    three = Towards.likeliest(goal, logits[:, :3], 1)
    torch.testing.assert_close(TARGETED_DLR(logits[:, :3], three), torch.tensor([-2.0, -3.0]))
    torch.testing.assert_close(TARGETED_DLR(logits, goal), DLR()(logits, goal))


@pytest.mark.parametrize("name", ["apgd-dlr", "apgd-l2-dlr", "apgd-l1-dlr", "apgd-t", "apgd-l2-t", "apgd-l1-t"])
def test_two_classes_fall_back_to_the_margin(name: str) -> None:
    model, x = Linear(bias=80.0), images(6, 8)
    attack: Any = make_attack(name, num_steps=50)
    result = attack(model, x, AWAY)
    reached = (model(x)[:, 0] - model(result.x_adv)[:, 0]).detach() / best_gain(attack.threat, -model.w.detach(), x)
    assert (reached[~result.success] > 0.98).all(), reached
    with pytest.raises(InputError, match="3 classes are needed"):
        APGDAttack(loss=DLR())(model, x, AWAY)
    assert DLR_OR_MARGIN(torch.tensor([[2.0, 1.0]]), Goal(AWAY[:1])).tolist() == [-1.0]


def test_sparse_sign_touches_as_many_values_as_told() -> None:
    g = torch.randn(4, 3, 5, 5, generator=seeded())
    step = sparse_sign(g, torch.tensor([0.0, 1.0, 7.3, 1000.0]))
    assert (step != 0).flatten(1).sum(1).tolist() == [1, 1, 8, 75]
    torch.testing.assert_close(step.abs().flatten(1).sum(1), torch.ones(4))
    assert (step * g >= 0).all()
    assert g[2].abs()[step[2] != 0].min() > g[2].abs()[step[2] == 0].max()
    assert not sparse_sign(torch.zeros(1, 3, 2, 2), torch.tensor([5.0])).any()


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = 1e4 * (x - 0.5).flatten(1)[:, :5]
        return torch.where(x[:, :1, 0, 0] > 0.7, torch.nan, z.round())


@pytest.mark.parametrize("kind", [APGDAttack, APGDL2Attack, APGDL1Attack, APGDTargetedAttack, APGDTargetedL1Attack])
def test_flat_and_undefined_models_still_give_members(kind: Any) -> None:
    x = images(6, 8)
    attack = kind(0.1, 5)
    for labels in (AWAY, AWAY + 4):
        assert attack.threat.contains(attack(Broken().eval(), x, labels).x_adv, x).all()


@pytest.mark.parametrize(
    ("kind", "wrong"), [(APGDAttack, {"rho": 1.5}), (APGDL1Attack, {"num_steps": 0}), (APGDTargetedAttack, {"n_targets": 0})]
)
def test_unusable_settings_are_refused(kind: Any, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        kind(**wrong)
