"""Attacks against optima that are known: in closed form for a linear model, by brute force on a tiny image."""

import itertools

import pytest
import torch
from attack_toys import Linear, images, small_net
from torch import Tensor, nn

from amsdn.attacks import (
    DLR,
    FGSM,
    Attack,
    Cascade,
    CrossEntropy,
    Loss,
    Margin,
    PatchPGD,
    PatchRS,
    PGDAttack,
    PGDL2Attack,
    RandomNoise,
    Restarts,
    SparsePGD,
    SparseRS,
)
from amsdn.attacks.losses import margin
from amsdn.attacks.patch_attacks import best_colour_gain, cut, paste
from amsdn.errors import InputError
from amsdn.threats import LinfBall, PatchRegion, SparsePixels

COUNT, SIZE = 6, 8


def fall(attack: Attack, model: Linear, x: Tensor) -> Tensor:
    """How far the attack lowers the linear model's margin, [B]."""
    result = attack(model, x, torch.zeros(len(x), dtype=torch.int64))
    return model(x)[:, 0] - model(result.x_adv)[:, 0]


def inner_images() -> Tensor:
    return images(COUNT, SIZE, low=0.3, high=0.7)  # no ball below touches the walls of the box


@pytest.mark.parametrize("loss", [CrossEntropy(), Margin()])
def test_linf_optimum_of_a_linear_model(loss: Loss) -> None:
    model, x = Linear(), inner_images()
    best = (0.1 * model.w.abs().sum()).expand(COUNT)
    torch.testing.assert_close(fall(PGDAttack(0.1, 0.03, 8, loss=loss), model, x), best)
    torch.testing.assert_close(fall(FGSM(0.1, loss=loss), model, x), best)


def test_linf_optimum_at_the_walls_of_the_box() -> None:
    model, x = Linear(), images(COUNT, SIZE)
    best = (model.w * (x - torch.where(model.w > 0, (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)))).flatten(1).sum(1)
    torch.testing.assert_close(fall(PGDAttack(0.1, 0.03, 8), model, x), best)


def test_l2_optimum_of_a_linear_model() -> None:
    model, x = Linear(), inner_images()
    best = (0.5 * model.w.norm()).expand(COUNT)
    torch.testing.assert_close(fall(PGDL2Attack(0.5, 0.25, 40), model, x), best, rtol=1e-4, atol=0)


def test_dlr_reaches_the_margin_optimum_for_three_classes() -> None:
    net, x = small_net(classes=4), images()
    y = net(x).argmax(1)
    attack = PGDAttack(0.02, 0.005, 10, loss=DLR())
    assert (attack(net, x, y).margin < RandomNoise(LinfBall(0.02), 50)(net, x, y).margin).all()


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        (SparsePGD(5, 150), 0.98),
        (Restarts(SparsePGD(5, 100), 4), 0.9999),
        (SparsePGD(5, 500, projected=True), 0.98),
        (SparseRS(5, 2000), 0.93),
    ],
)
def test_sparse_attacks_near_the_optimum_of_a_linear_model(attack: Attack, share: float) -> None:
    model, x = Linear(), images(COUNT, SIZE)
    best = best_colour_gain(-model.w.detach().expand_as(x), x).flatten(1).topk(5, dim=1).values.sum(1)
    reached = fall(attack, model, x).detach() / best
    assert (reached <= 1 + 1e-4).all()
    assert reached.mean() > share, reached


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        # First order is exact here: with every place a candidate, one whole step is the optimum itself.
        (PatchPGD(2, 1, move="never", candidates=600, alpha=1.0), 0.9999),
        # Weights without any spatial structure: a move by one pixel meets unrelated content, the worst case for both.
        (Restarts(PatchPGD(2, 40, candidates=10), 12), 0.95),
        (Restarts(PatchRS(2, 300), 12), 0.85),
    ],
)
def test_patch_attacks_near_the_optimum_of_a_linear_model(attack: Attack, share: float) -> None:
    model, x = Linear(), images(COUNT, SIZE)
    gain = best_colour_gain(-model.w.detach().expand_as(x), x)
    best = 4 * torch.nn.functional.avg_pool2d(gain, 2, stride=1).flatten(1).amax(1)
    reached = fall(attack, model, x).detach() / best
    assert (reached <= 1 + 1e-4).all()
    assert reached.mean() > share, reached


class Curved(nn.Module):
    """Three classes, not linear, for images of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(SIZE, 0.0, seed=1), Linear(SIZE, 0.0, seed=2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x)[:, 0], self.second(x)[:, 0]
        return torch.stack([50 + a.sin(), b.cos() + x[:, 0, 3, 3], a * 0.1], 1)


def every_single_pixel(image: Tensor) -> Tensor:
    """image [3,8,8] -> the 64 x 8 images with one pixel at one corner of the colour cube."""
    colours = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).reshape(8, 3, 1, 1)
    corners = torch.tensor(list(itertools.product(range(SIZE), repeat=2)))
    count = len(corners)
    return torch.cat([paste(image.expand(count, -1, -1, -1), c.expand(count, -1, -1, -1), corners) for c in colours])


def test_one_pixel_by_brute_force() -> None:
    net, x = Curved(), images(4, SIZE)
    y = torch.zeros(4, dtype=torch.int64)
    worst = [margin(net(every_single_pixel(image)), torch.zeros(512, dtype=torch.int64)).min() for image in x]
    found = SparseRS(k=1, num_queries=5000)(net, x, y).margin  # misses one of 512 with probability exp(-5000 / 504)
    torch.testing.assert_close(found, torch.stack(worst), atol=1e-4, rtol=1e-5)


def test_cut_undoes_paste() -> None:
    x, content = images(4, SIZE), images(4, 3, seed=1)
    corner = torch.tensor([[0, 0], [5, 5], [2, 4], [0, 5]])
    pasted = paste(x, content, corner)
    assert torch.equal(cut(pasted, corner, 3), content)
    assert PatchRegion(3).contains(pasted, x).all()
    assert torch.equal(paste(pasted, cut(x, corner, 3), corner), x)


def test_moves_travel_with_their_content_and_help() -> None:
    net, x = small_net(), images(8)
    y = net(x).argmax(1)
    still = PatchPGD(4, 20, move="never", stop_when_fooled=False)(net, x, y)
    for move, forwards in (("random", 40), ("full", 100)):
        moving = PatchPGD(4, 20, move=move, stop_when_fooled=False)(net, x, y)  # type: ignore[arg-type]
        assert moving.margin.mean() < still.margin.mean()
        assert (moving.forwards == 1 + forwards).all()  # one more for the clean image
        assert (moving.backwards == 20).all()


def test_one_step_of_sparse_pgd_costs_one_forward_and_one_backward() -> None:
    net, x = small_net(), images()
    result = SparsePGD(5, 1, alpha=1.0, beta=1.0, stop_when_fooled=False)(net, x, net(x).argmax(1))
    assert (result.forwards == 2).all()
    assert (result.backwards == 1).all()
    assert (result.spent == 5).all()


def test_whole_image_budgets() -> None:
    net, x = small_net(), images(3)
    y = net(x).argmax(1)
    for attack in (SparsePGD(1000, 3), SparseRS(256, 9), SparseRS(1000, 9), SparseRS(250, 9), PatchRS(16, 9), PatchPGD(16, 3)):
        assert attack(net, x, y).success.any()


def test_restarts_and_cascades_are_the_worst_case_of_their_parts() -> None:
    net, x = small_net(), images(12)
    y = net(x).argmax(1)
    one = SparsePGD(3, 5)(net, x, y)
    many = Restarts(SparsePGD(3, 5), 4)(net, x, y)
    assert (many.success >= one.success).all()  # the first restart is the attack itself
    assert (many.margin[~many.success] <= one.margin[~many.success] + 1e-6).all()
    both = Cascade((SparsePGD(3, 5), SparseRS(3, 60)))(net, x, y)
    assert (both.success >= one.success).all()
    assert torch.equal(both.x_adv[one.success], one.x_adv[one.success])  # what is broken is not attacked again
    assert torch.equal(both.forwards[one.success], one.forwards[one.success] + (one.forwards[one.success] > 1))
    assert both.success.sum() > one.success.sum()


def test_cascades_of_different_threats_are_refused() -> None:
    with pytest.raises(InputError, match="share the threat sparse 3, got sparse 4"):
        Cascade((SparsePGD(3), SparseRS(4)))
    with pytest.raises(InputError, match="share the threat"):
        Cascade((PGDAttack(0.5), PGDL2Attack(0.5)))
    with pytest.raises(InputError, match="at least one attack"):
        Cascade(())
    assert Cascade((SparsePGD(3), SparseRS(3))).threat == SparsePixels(3)
