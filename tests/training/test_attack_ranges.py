"""Ranges draw what they promise; the noisy sparse step stays in its threat, costs one pass each way, and is sPGD where it has no noise."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from amsdn.attacks import NFGSM, SparsePGD
from amsdn.errors import InputError
from amsdn.threats import changed_pixels
from amsdn.training.attack_ranges import NoisySparseStep, OneStepSparse, PatchSizes, PixelCounts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits of two classes, linear in the pixels; counts passes each way, by images."""

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3 * side * side, generator=seeded(3)))
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits: Tensor = x.flatten(1) @ self.weight.T
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


def images(count: int, side: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, side, side, generator=seeded(1)), torch.arange(count) % 2


def test_patch_sizes_are_drawn_evenly_and_each_attack_moves_and_never_stops_early() -> None:
    family, gen = PatchSizes((4, 5, (2, 7)), num_steps=3), seeded()
    drawn = [family.draw(gen) for _ in range(600)]
    counts = Counter(attack.size for attack in drawn)
    assert set(counts) == {4, 5, (2, 7)}
    assert min(counts.values()) > 150
    assert all(a.num_steps == 3 and a.move == "random" and not a.stop_when_fooled for a in drawn)


def test_pixel_counts_are_uniform_over_the_whole_range_ends_included() -> None:
    family, gen = PixelCounts(3, 6), seeded()
    counts = Counter(int(family.draw(gen).k) for _ in range(800))
    assert set(counts) == {3, 4, 5, 6}
    assert min(counts.values()) > 150


def test_one_step_sparse_draws_either_gradient_or_the_one_it_was_told() -> None:
    gen = seeded()
    assert {OneStepSparse(6).draw(gen).projected for _ in range(20)} == {False, True}
    assert {OneStepSparse(6, projected=True).draw(gen).projected for _ in range(20)} == {True}
    told, free = seeded(), seeded()
    OneStepSparse(6, projected=False).draw(told)
    OneStepSparse(6).draw(free)
    assert torch.equal(told.get_state(), free.get_state()), "what is told must not shift what is drawn next"


@pytest.mark.parametrize("projected", [False, True])
def test_without_noise_the_step_is_one_step_of_spgd(projected: bool) -> None:
    model, (x, y) = Linear(), images(6)
    ours = NoisySparseStep(5, noise=0, projected=projected).craft(model, x, y, seeded(7))
    theirs = SparsePGD(5, 1, projected, alpha=1, beta=1, stop_when_fooled=False).craft(model, x, y, seeded(7))
    assert torch.equal(ours, theirs)
    assert NoisySparseStep(5, noise=0).threat.k == 5


def test_noise_covers_none_to_all_of_its_pixels_and_the_step_costs_one_pass_each_way() -> None:
    model, (x, y) = Linear(), images(400)
    attack = NoisySparseStep(4, noise=2.0)
    noisy = attack._noisy(x, seeded())
    counts = changed_pixels(noisy, x).flatten(1).sum(1)
    assert set(counts.tolist()) == set(range(9))
    assert counts.bincount().min() > 20, "uniform from 0 to 2k"
    assert 0 <= float(noisy.min()) <= float(noisy.max()) <= 1
    x_adv = attack.craft(model, x, y, seeded())
    assert (model.forwards, model.backwards) == (1, 1)
    spent = attack.threat.spent(x_adv, x)
    assert attack.threat.k == 12
    assert float(spent.max()) == 12
    assert float(spent.min()) <= 5


def test_the_step_climbs_from_the_noisy_image() -> None:
    """On a linear model every value that the step sets moves up the gradient of the loss, so noise plus step beats noise alone."""
    model, (x, y) = Linear(), images(200)
    attack = NoisySparseStep(6, noise=1.0)
    x_adv = attack.craft(model, x, y, seeded(2))
    noisy = attack._noisy(x, seeded(2))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x_adv), y, reduction="none") - nn.functional.cross_entropy(
            model(noisy), y, reduction="none"
        )
    assert float((loss > 0).float().mean()) > 0.95
    assert (changed_pixels(x_adv, noisy).flatten(1).sum(1) <= 6).all()


def test_unprojected_n_fgsm_costs_one_pass_each_way_and_goes_beyond_epsilon() -> None:
    model, (x, y) = Linear(), images(10)
    attack = NFGSM(epsilon=0.05, k=2.0, projected=False, stop_when_fooled=False)
    x_adv = attack.craft(model, x, y, seeded())
    assert (model.forwards, model.backwards) == (1, 1)
    reach = (x_adv - x).abs().amax()
    assert 0.05 < float(reach) <= 0.15 + 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: PatchSizes(()),
        lambda: PatchSizes((4, 0)),
        lambda: PatchSizes(num_steps=0),
        lambda: PixelCounts(0, 5),
        lambda: PixelCounts(6, 5),
        lambda: PixelCounts(1, 5, num_steps=0),
        lambda: OneStepSparse(0),
        lambda: OneStepSparse(5, noise=-1),
        lambda: NoisySparseStep(5, alpha=0),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        make()
