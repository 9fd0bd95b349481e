"""Pixel attacks: whole pixels are counted, budgets hold per image, draws are fair, and optima found by brute force are found."""

import itertools
import math

import pytest
import torch
from attack_toys import Gate, Linear, gate_images, images, small_net
from torch import Tensor, nn

from amsdn.attacks import Attack, FewPixelDE, Goal, GuidedSparseRS, Restarts, SigmaZero, SparsePGD, SparseRS, Victim
from amsdn.attacks.few_pixel import others, render
from amsdn.attacks.losses import margin
from amsdn.attacks.patch_attacks import best_colour_gain
from amsdn.attacks.search_attacks import distinct, sparse_divisor
from amsdn.errors import InputError
from amsdn.threats import SparsePixels, changed_pixels

SIDE = 4
PIXELS = SIDE * SIDE
COLOURS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))  # [8,3]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pairs(nn.Module):
    """Two classes for 4x4 images, far from linear: what a pixel is worth depends on the others, but it is monotone in no value."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(torch.randn(3 * PIXELS, 12, generator=generator) / 3)
        self.last = nn.Parameter(torch.randn(12, generator=generator))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = torch.tanh(x.flatten(1) @ self.first) @ self.last + 20  # never fooled: attacks show how far they get
        return torch.stack([score, torch.zeros_like(score)], 1)


def worst_margin(net: nn.Module, image: Tensor, k: int) -> Tensor:
    """The lowest margin of class 0 over every place and {0,1} colour of k pixels of image [3,4,4]."""
    candidates = []
    for places in itertools.combinations(range(PIXELS), k):
        for colours in itertools.product(COLOURS, repeat=k):
            candidate = image.flatten(1).clone()
            candidate[:, list(places)] = torch.stack(colours, 1)
            candidates.append(candidate)
    batch = torch.stack(candidates).unflatten(2, (SIDE, SIDE))
    return margin(net(batch), torch.zeros(len(batch), dtype=torch.int64)).min()


@pytest.mark.parametrize(
    ("attack", "slack"),
    [
        (SparseRS(1, 900), 1e-4),
        (Restarts(SparseRS(2, 500), 3), 0.03),
        (GuidedSparseRS(1, 300), 1e-4),
        (Restarts(GuidedSparseRS(2, 150), 4), 0.02),
        (FewPixelDE(1, 400, 12), 1e-4),
        (FewPixelDE(2, 400, 40), 0.02),
        (Restarts(SparsePGD(1, 60), 4), 0.05),
        (Restarts(SparsePGD(2, 50), 5), 0.05),
        (Restarts(SparsePGD(2, 50, projected=True), 5), 0.05),
    ],
)
def test_brute_force_over_places_and_colours(attack: Attack, slack: float) -> None:
    net, x = Pairs(), images(3, SIDE)
    k = int(torch.as_tensor(attack.threat.budget))
    worst = torch.stack([worst_margin(net, image, k) for image in x])
    clean = margin(net(x), torch.zeros(3, dtype=torch.int64))
    found = attack(net, x, torch.zeros(3, dtype=torch.int64)).margin
    # The net is not monotone in a value, so an attack that tries colours inside the cube may find a little more.
    assert (found <= worst + slack * (clean - worst)).all(), (found, worst, clean)
    assert (found >= worst - 0.1 * (clean - worst)).all(), "the brute force missed much: it is no oracle here"


def fewest_pixels(model: Linear, x: Tensor) -> Tensor:
    """How many pixels take the margin of a linear model below zero, [B]."""
    gain = best_colour_gain(-model.w.detach().expand_as(x), x).flatten(1).sort(dim=1, descending=True).values
    return 1 + (gain.cumsum(1) <= model(x)[:, :1].detach()).sum(1)


def test_sigma_zero_near_the_fewest_pixels_of_a_linear_model() -> None:
    model, x = Linear(), images(6, 8)
    y = torch.zeros(6, dtype=torch.int64)
    fewest = fewest_pixels(model, x)
    result = SigmaZero(64, 400, stop_when_fooled=False)(model, x, y)
    assert result.success.all()
    assert (result.spent >= fewest).all()
    assert (result.spent / fewest).mean() < 1.06, (result.spent, fewest)
    enough = SigmaZero(int(result.spent.max()), 400)(model, x, y)
    assert enough.success.all()
    assert (enough.forwards <= result.forwards).all()


class OnePixel(nn.Module):
    """The margin of class 0 is positive unless all three channels of pixel (2, 1) are dark; every other value hardly matters."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, :, 2, 1].sum(1) - 0.3 + 1e-3 * x.flatten(1).sum(1)
        return torch.stack([score, torch.zeros_like(score)], 1)


def test_sigma_zero_counts_the_channels_of_a_pixel_once() -> None:
    x = images(4, 8, low=0.4, high=0.8)
    result = SigmaZero(1, 200)(OnePixel().eval(), x, torch.zeros(4, dtype=torch.int64))
    assert result.success.all()
    assert (result.spent == 1).all()
    assert (changed_pixels(result.x_adv, x).nonzero()[:, 2:] == torch.tensor([2, 1])).all()


def test_the_slope_of_the_smooth_count_is_its_gradient() -> None:
    attack, delta = SigmaZero(3), (images(2, 5, low=-0.5, high=0.5)).requires_grad_(True)
    square = delta.square().sum(1)
    smooth = (square / (square + attack.sigma)).flatten(1).sum(1) / 25
    (gradient,) = torch.autograd.grad(smooth.sum(), delta)
    torch.testing.assert_close(attack._count_slope(delta.detach()), gradient, rtol=1e-4, atol=1e-9)
    assert attack._rate(0) == pytest.approx(1.0)
    assert attack._rate(attack.num_steps) == pytest.approx(0.1)


def sigma_zero_of_one_image(net: nn.Module, x: Tensor, label: Tensor, steps: int) -> tuple[Tensor, float]:
    """Algorithm 1 of the paper for pixels, written once more with autograd: the smallest adversarial image of x [1,3,H,W]."""
    delta, tau, best, fewest = torch.zeros_like(x), 0.3, x, math.inf
    for i in range(steps + 1):
        leaf = delta.clone().requires_grad_(True)
        logits = net(x + leaf)
        square = leaf.square().sum(1)
        objective = margin(logits, label).clamp(min=0) + (square / (square + 1e-3)).sum() / square.numel()
        fooled = bool(logits.argmax(1) != label)
        size = float((delta != 0).any(1).sum())
        if fooled and size < fewest:
            best, fewest = x + delta, size
        (slope,) = torch.autograd.grad(objective.sum(), leaf)
        eta, following = (0.1 + 0.45 * (1 + math.cos(math.pi * j / steps)) for j in (i, i + 1))
        delta = (x + delta - eta * slope / slope.abs().max().clamp_min(1e-30)).clamp(0, 1) - x
        tau = min(max(tau + 0.01 * following * (1 if fooled else -1), 0.0), 1.0)
        delta = delta * (delta.square().sum(1, keepdim=True).sqrt() >= tau)
    return best, fewest


def test_sigma_zero_follows_its_algorithm() -> None:
    net, x = small_net(), images(5)
    y = net(x).argmax(1)
    result = SigmaZero(256, 25, stop_when_fooled=False)(net, x, y)
    for i in range(5):
        best, fewest = sigma_zero_of_one_image(net, x[i : i + 1], y[i : i + 1], 25)
        assert float(result.spent[i]) == fewest
        torch.testing.assert_close(result.x_adv[i], best[0], atol=0.02, rtol=0)  # rounding grows over the steps


@pytest.mark.parametrize("attack", [SparsePGD, SparseRS, GuidedSparseRS, SigmaZero])
def test_a_budget_for_each_image(attack: type[Attack]) -> None:
    net, x = Gate(), gate_images()
    k = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 12])
    result = attack(k, 40)(net, x, net(x).argmax(1))  # dark images leave, bright ones stay to the end
    assert (result.spent <= k).all()
    assert result.success[:8].any()
    assert not result.success[8:].any()
    if attack is not SigmaZero:
        assert torch.equal(result.spent[8:], k[8:].float())


@pytest.mark.parametrize("attack", [SparseRS, GuidedSparseRS])
def test_random_search_with_one_budget_is_that_of_equal_budgets(attack: type[Attack]) -> None:
    net, x = small_net(), images(4)
    y = net(x).argmax(1)
    one, each = (attack(k, 60)(net, x, y) for k in (5, torch.full((4,), 5)))
    assert torch.equal(one.x_adv, each.x_adv)


@pytest.mark.parametrize("budgets", [[6, 6], [6, 1], [16, 3], [15, 15]])
def test_a_proposal_moves_its_share_of_the_pixels(budgets: list[int]) -> None:
    x, k = images(2, SIDE, low=0.2, high=0.8), torch.tensor(budgets)
    attack, generator = SparseRS(k, 10_000, alpha_init=1.0), seeded()
    state = attack.start(x, SparsePixels(k), generator)
    for query in (1, 60, 300, 9000):
        new = attack.propose(state, query, x, generator)
        count = [max(int(n / sparse_divisor(query, 10_000)), 1) for n in budgets]
        for before, after, n, moved, image in zip(zip(*state, strict=True), zip(*new, strict=True), budgets, count, x, strict=True):
            assert torch.equal(after[0].sort().values, torch.arange(PIXELS))
            old, fresh = set(before[0][:n].tolist()), set(after[0][:n].tolist())
            assert len(fresh) == n
            assert len(old - fresh) <= min(moved, PIXELS - n)
            outside = sorted(set(range(PIXELS)) - fresh)
            assert torch.equal(after[1][:, outside], image.flatten(1)[:, outside])
            kept = sorted(old & fresh)
            recoloured = (after[1][:, kept] != before[1][:, kept]).any(0).sum()
            assert recoloured <= moved - len(old - fresh)
            assert set(after[1][:, sorted(fresh)].unique().tolist()) <= {0.0, 1.0}
        state = new


def test_a_proposal_is_any_pixel_but_those_kept_as_likely() -> None:
    x, attack, generator = images(1, SIDE), SparseRS(2, alpha_init=0.5), seeded()
    state = attack.start(x, SparsePixels(2), generator)
    order = torch.stack([attack.propose(state, 1, x, generator)[0][0] for _ in range(3000)])
    was, now = state[0][0, :2].tolist(), order[:, :2].sort(1).values
    pairs = torch.bincount(now[:, 0] * PIXELS + now[:, 1], minlength=PIXELS**2).reshape(PIXELS, PIXELS)
    pairs = (pairs + pairs.T).float() / 3000
    assert pairs[was[0], was[1]] == pytest.approx(1 / 15, abs=0.02)  # the pixel given up comes back, in a new colour
    others = [pixel for pixel in range(PIXELS) if pixel not in was]
    assert (pairs[was][:, others] - 1 / 30).abs().max() < 0.015
    assert pairs[others][:, others].sum() == 0


def test_draws_without_repetition_are_fair() -> None:
    below, generator = torch.tensor([2, 3, 4]), seeded()
    draws = torch.stack([distinct(below, 2, 4, 2, generator) for _ in range(3000)])  # [3000,3,2]
    for row, n in enumerate(below.tolist()):
        code = draws[:, row, 0] * n + draws[:, row, 1]
        counts = torch.bincount(code, minlength=n * n).reshape(n, n)
        assert (counts.diagonal() == 0).all()
        ordered = counts[~torch.eye(n, dtype=torch.bool)].float() / 3000
        assert (ordered - 1 / (n * (n - 1))).abs().max() < 0.04
    assert distinct(torch.tensor([1, 1]), 1, 1, 3, generator).tolist() == [[0, 0, 0]] * 2


def test_schedule_of_sparse_rs() -> None:
    at = [1, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 6000, 6001, 8000, 8001, 9999]
    assert [sparse_divisor(q, 10_000) for q in at] == [2, 2, 4, 4, 5, 5, 6, 6, 8, 8, 10, 10, 12, 12, 15, 15, 20, 20]
    assert [sparse_divisor(q, 1000) for q in (1, 5, 6, 999)] == [2, 2, 4, 20]


class Flat(nn.Module):
    """Steps of an eighth: no gradient anywhere, as behind a quantising defence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Linear(8, 0.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) * 8).round() / 8 + torch.tensor([100.0, 0.0])


def test_guided_search_profits_from_the_gradient_and_survives_without() -> None:
    model, x, y = Linear(bias=100.0), images(12, 8), torch.zeros(12, dtype=torch.int64)
    gain = best_colour_gain(-model.w.detach().expand_as(x), x).flatten(1).topk(5, dim=1).values.sum(1)
    reached = (model(x)[:, 0] - GuidedSparseRS(5, 150)(model, x, y).margin).detach() / gain
    assert (reached <= 1 + 1e-4).all()
    assert reached.mean() > 0.95, reached  # Sparse-RS needs about 2,000 queries for as much
    masked, blind = (attack(Flat(), x, y).margin.mean() for attack in (GuidedSparseRS(5, 400), SparseRS(5, 400)))
    assert masked < blind + 0.1 * gain.mean()


def test_guided_colours_follow_the_slope_and_are_fair_without() -> None:
    slope = torch.tensor([2.0, -1e-9, 0.0]).reshape(1, 3, 1, 1).expand(400, 3, 5, 5)
    shares = [GuidedSparseRS(5, flip=flip)._colours(slope, seeded()).mean((0, 2, 3)) for flip in (0.0, 0.25)]
    torch.testing.assert_close(torch.stack(shares), torch.tensor([[1.0, 0.0, 0.5], [0.75, 0.25, 0.5]]), atol=0.02, rtol=0)


def test_guided_search_costs_a_gradient_every_few_queries() -> None:
    net, x = Gate(), gate_images()
    result = GuidedSparseRS(3, 25, refresh=10)(net, x, net(x).argmax(1))
    assert (result.forwards[8:] == 1 + 25 + 3).all()
    assert (result.backwards[8:] == 3).all()


def test_few_pixel_candidates() -> None:
    x = images(2, SIDE, low=0.2, high=0.8)
    genes = torch.rand(2, 50, 3, 5, generator=seeded())
    genes[0, 0, :, :2] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    pictures = render(genes, x)
    assert pictures.shape == (2, 50, 3, SIDE, SIDE)
    for b, p in itertools.product(range(2), range(50)):
        expected = x[b].clone()
        for row, column, *colour in genes[b, p].tolist():
            expected[:, min(int(row * SIDE), SIDE - 1), min(int(column * SIDE), SIDE - 1)] = torch.tensor(colour)
        torch.testing.assert_close(pictures[b, p], expected)


def test_parents_are_different_and_equally_likely() -> None:
    a, b, c = others(2000, 4, torch.zeros(1), seeded())
    own = torch.arange(4).expand(2000, 4)
    together = torch.stack([own, a, b, c], -1)
    assert (together.sort(-1).values == torch.arange(4)).all()  # of four, the three others are all taken
    a, b, c = others(4000, 6, torch.zeros(1), seeded())
    for first, second in itertools.permutations((a, b, c), 2):
        counts = torch.bincount((first * 6 + second)[:, 0], minlength=36).reshape(6, 6)
        assert counts[0].sum() == counts[:, 0].sum() == counts.diagonal().sum() == 0
        assert (counts[counts > 0] / 4000 - 1 / 20).abs().max() < 0.02
        assert (counts > 0).sum() == 20


def test_few_pixel_calls_are_chunked_counted_and_end_early() -> None:
    net, x = Gate(), gate_images()
    y = net(x).argmax(1)
    net.seen.clear()
    result = FewPixelDE(2, 20, 3, chunk=50)(net, x, y)
    assert max(net.seen) <= 50
    assert sum(net.seen) == int(result.forwards.sum()) + len(x)
    assert (result.forwards[8:] == 1 + 4 * 20).all()
    assert (result.forwards[:8][result.success[:8]] < 20).any()  # before its first generation was over
    assert (result.spent <= 2).all()


def test_a_view_may_hold_a_sample_several_times() -> None:
    net, x = Linear(), images(3, 8)
    victim = Victim.of(net, 3, x.device)
    rows = torch.tensor([0, 2, 0, 0])
    view = victim.select(rows)
    view.logits(x[rows])
    view.gradient(x[rows], lambda logits: margin(logits, Goal(torch.zeros(4, dtype=torch.int64)).labels))
    assert victim.forwards.tolist() == [6, 0, 2]
    assert victim.backwards.tolist() == [3, 0, 1]


def test_unusable_settings() -> None:
    for make, message in [
        (lambda: FewPixelDE(1, 3), "population"),
        (lambda: FewPixelDE(torch.tensor([1, 2])), "one whole number"),
        (lambda: FewPixelDE(1, chunk=0), "chunk"),
        (lambda: SigmaZero(5, sigma=0.0), "sigma"),
        (lambda: GuidedSparseRS(5, blind=1.5), "blind"),
        (lambda: GuidedSparseRS(5, refresh=0), "refresh"),
        (lambda: SigmaZero(5, threshold=1.5), "threshold"),
        (lambda: SigmaZero(0), "SparsePixels"),
    ]:
        with pytest.raises(InputError, match=message):
            make()
