"""Many smoothing certificates at once: sound on classifiers known in closed form, and each as if its image were alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import HalfSpace
from scipy.special import ndtr, ndtri
from smoothing_toys import Slabs, Watching, chance_of_more, half_space, points, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN, Claim, Sample
from amsdn.evaluation.sequential_test import SequentialTest, least_hits, lower_bound
from amsdn.evaluation.smoothing import fixed_radius
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier, smoothed_predictions
from amsdn.evaluation.smoothing_judges import FixedSamples, GreatestRadius, MostProbable, SmoothingConfig, Tally, TargetRadii
from amsdn.models.amsdn import AMSDN
from amsdn.utils.helpers import generator

SIGMA = 0.25
TARGETS = SmoothingConfig(sigma=SIGMA, radii=(0.0, 0.25, 0.5), n0=64, n=4000, block=32, batch_size=512)
LARGEST = replace(TARGETS, radii=())
FIXED = replace(TARGETS, fixed=True, n=480)
PROCEDURES = pytest.mark.parametrize("config", [TARGETS, LARGEST, FIXED], ids=["targets", "largest", "fixed"])
ROUNDING = 1e-6  # of distances in float32


def certify(model: nn.Module, x: Sequence[Tensor] | Tensor, config: SmoothingConfig, ids: Sequence[int] | None = None) -> dict[int, Claim]:
    """The claims about images x, which have the sample ids 0, 1, ... unless told otherwise."""
    samples = (Sample(i, image) for i, image in zip(ids or range(len(x)), x, strict=True))
    return timeless({i: claims["l2"] for i, claims in SmoothingCertifier(model, config).certify(samples)})


def timeless(claims: dict[int, Claim]) -> dict[int, Claim]:
    assert all(claim.seconds > 0 for claim in claims.values())
    return {i: claim._replace(seconds=0.0) for i, claim in claims.items()}


def noise_blocks(config: SmoothingConfig, sample_id: int, shape: torch.Size) -> Iterator[Tensor]:
    """The noise [block,3,H,W] of an image, block after block, as the module says it is drawn."""
    key = SmoothingCertifier(half_space(), config).key
    draw = generator("cpu", config.seed, key, sample_id)
    while True:
        yield config.sigma * torch.randn((config.block, *shape), generator=draw)


def alone(model: nn.Module, image: Tensor, config: SmoothingConfig, sample_id: int) -> Claim:
    """The same claim by the plainest means: one image, one block at a time, the class chosen on blocks that are then forgotten."""
    blocks = noise_blocks(config, sample_id, image.shape)

    def answers(count: int) -> list[int]:
        return [int(a) for _ in range(count) for a in model(image + next(blocks)).argmax(1)]

    chosen = answers(-(-config.n0 // config.block))
    guess = min(set(chosen), key=lambda c: (-chosen.count(c), c))
    judge, counted = config.judge(), list[int]()
    state, look, decided = judge.start(), judge.next_look(0), False
    while not decided:
        counted += answers(1)
        if len(counted) >= look:
            others = max((counted.count(c) for c in set(counted) - {guess}), default=0)
            tally = Tally(*(np.array([v]) for v in (counted.count(guess), others, len(counted))))
            decided, look = bool(judge.decided([state], tally)[0]), judge.next_look(len(counted))
    radius = judge.radius(state, counted.count(guess), len(counted))
    claim = (ABSTAIN, 0.0) if radius is None else (guess, radius)
    return Claim(*claim, samples=len(chosen) + len(counted), seconds=0.0)


# --- soundness ----------------------------------------------------------------------------------------------------------


@PROCEDURES
@pytest.mark.parametrize("seed", [0, 1])
def test_a_half_space_is_never_over_certified(config: SmoothingConfig, seed: int) -> None:
    model = half_space(seed, side=2)
    distances = [0.025 * i for i in range(-24, 25)]
    claims = certify(model, points(model, distances), replace(config, seed=seed, batch_size=2048))
    for i, distance in enumerate(distances):
        assert claims[i].radius <= abs(distance) + ROUNDING
        assert claims[i].prediction in (ABSTAIN, int(distance > 0))
        assert claims[i].samples <= config.n0 + config.n


def test_targets_a_little_below_the_truth_are_certified() -> None:
    model = half_space(side=2)
    config = replace(TARGETS, n=20_000)
    distances = [0.03, 0.27, 0.29, 0.32, 0.47, 0.54, 0.56, 0.6]
    claims = certify(model, points(model, distances), config)
    assert [claims[i].radius for i in range(len(distances))] == [0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5]
    assert all(claim.prediction == 1 for claim in claims.values())
    assert claims[7].samples < claims[5].samples / 2, "what is clear must cost less than what is close"


def test_the_largest_radius_is_nearly_the_truth() -> None:
    model = half_space(side=2)
    distances = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    claims = certify(model, points(model, distances), replace(LARGEST, n=10_000))
    for i, distance in enumerate(distances):
        assert 0.85 * distance - 0.01 < claims[i].radius <= distance


@pytest.mark.parametrize(("config", "distance", "untrue"), [(TARGETS, 0.0, 0.0), (TARGETS, 0.25, 0.25), (LARGEST, 0.1, 0.1)])
def test_errors_are_as_rare_as_alpha_and_not_absent(config: SmoothingConfig, distance: float, untrue: float) -> None:
    """On the boundary of a target its null is true: claiming it is an error, at alpha 0.2 often enough to be seen."""
    model, alpha, trials = half_space(side=1), 0.2, 600
    settings = replace(config, alpha=alpha, beta=1e-4, n=640, n0=32, batch_size=8192)  # many images at a time
    image = points(model, [distance])[0]
    claims = certify(model, [image] * trials, settings)
    wrong = sum(c.radius >= untrue - ROUNDING and c.prediction != ABSTAIN for c in claims.values())
    assert 0.02 < wrong / trials <= chance_of_more(alpha, trials)


def test_samples_that_choose_the_class_do_not_count_for_it() -> None:
    """A fair coin: of 16 fresh tosses 13 agree with a guess as seldom as they must; with the very tosses that made the guess, twice as often."""
    model, trials = Coin(2), 1000
    config = SmoothingConfig(sigma=SIGMA, n0=16, n=16, block=16, fixed=True, alpha=0.2, batch_size=256)
    claims = certify(model.eval(), [torch.full((3, 1, 1), 0.5)] * trials, config)
    share = sum(c.prediction != ABSTAIN for c in claims.values()) / trials
    exact = sum(math.comb(16, k) for k in range(17) if fixed_radius(k, 16, 0.2, SIGMA) is not None) / 2**16
    assert exact <= 0.2
    assert abs(share - exact) <= 3 * math.sqrt(exact * (1 - exact) / trials)


class Coin(nn.Module):
    """One of several equally probable classes, by the quantile of the first pixel's noise around 1/2."""

    def __init__(self, sides: int) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, x: Tensor) -> Tensor:
        u = torch.special.ndtr((x[:, 0, 0, 0] - 0.5) / SIGMA)
        return nn.functional.one_hot((u * self.sides).long().clamp(0, self.sides - 1), self.sides).float()


@pytest.mark.parametrize("distance", [0.0, 0.1, 0.15, 0.195, -0.3, 0.6])
def test_three_classes_are_held_to_what_the_half_against_all_others_can_show(distance: float) -> None:
    flat = half_space(side=2)
    model = Slabs(flat.direction, flat.offset).eval()
    middle = float(ndtr((0.2 - distance) / SIGMA) - ndtr((-0.2 - distance) / SIGMA))
    p = [float(ndtr((-0.2 - distance) / SIGMA)), middle, float(ndtr((distance - 0.2) / SIGMA))]
    best = int(np.argmax(p))
    for config in (TARGETS, LARGEST, FIXED):
        claims = certify(model, [points(model, [distance])[0]] * 12, config)
        for claim in claims.values():
            assert claim.prediction in (ABSTAIN, best)
            assert claim.radius <= SIGMA * max(0.0, float(ndtri(p[best]))) + ROUNDING
            if p[best] <= 0.5:
                assert claim.prediction == ABSTAIN


def test_without_a_majority_nothing_is_claimed_and_sampling_stops_early() -> None:
    claims = certify(Coin(3).eval(), [torch.full((3, 1, 1), 0.5)] * 20, TARGETS)
    assert all(c[:2] == (ABSTAIN, 0.0) for c in claims.values())
    assert np.mean([c.samples for c in claims.values()]) < 400


# --- each as if alone ---------------------------------------------------------------------------------------------------


def tiny_conv_net() -> nn.Module:
    """Random weights, answers that noise changes often: nothing is decided by a wide margin."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    ).eval()


class Undecided(nn.Module):
    """An untrained AMSDN answers one thing only; less its mean logits on noisy copies of these images, it wavers."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = AMSDN(num_classes=3, variant="compact", width=4, fpn_channels=8)
        self.eval()
        with torch.no_grad():
            self.register_buffer("mean", self.model(x + SIGMA * torch.randn(x.shape, generator=seeded(2))).mean(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) - self.mean


def noisy_images(count: int, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=seeded(9))


@PROCEDURES
@pytest.mark.parametrize("make", [lambda: half_space(side=8), tiny_conv_net], ids=["half-space", "conv"])
@torch.no_grad()
def test_every_claim_is_that_of_the_image_alone(config: SmoothingConfig, make: Callable[[], nn.Module]) -> None:
    config = replace(config, n=min(config.n, 320), sigma=0.5, alpha=0.05)
    model, x = make(), noisy_images(11)
    expected = {i: alone(model, x[i], config, i) for i in range(len(x))}
    assert len({claim.prediction for claim in expected.values()}) > 1
    assert len({claim.samples for claim in expected.values()}) > 1 or config.fixed
    assert certify(model, x, config) == expected
    for batch_size in (32, 96, 1024):  # 1, 3 and 32 blocks at a time
        assert certify(model, x, replace(config, batch_size=batch_size)) == expected
    backwards = [*reversed(range(len(x)))]
    assert certify(model, x[backwards], config, backwards) == expected
    some = [3, 10, 4]
    assert certify(model, x[some], config, some) == {i: expected[i] for i in some}
    assert certify(model, x[6:7], config, [6]) == {6: expected[6]}


def test_every_forward_pass_of_a_real_model_has_one_shape_and_the_company_does_not_matter() -> None:
    """Equal shapes are what makes a network round alike in company, in the tail and alone."""
    x = noisy_images(7, side=16) * torch.linspace(0.2, 1, 7).reshape(-1, 1, 1, 1)
    model = Undecided(x).eval()
    config = replace(TARGETS, n=256, n0=16, block=16, batch_size=80, alpha=0.05)
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    together = certify(model, x, config)
    assert {i: certify(model, x[i : i + 1], config, [i])[i] for i in range(len(x))} == together
    assert set(shapes) == {(80, 3, 16, 16)}
    assert len({claim.samples for claim in together.values()}) > 2
    assert len({claim.prediction for claim in together.values()}) > 2


def test_images_of_several_sizes_in_one_stream() -> None:
    class Brightness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            middle = x[:, :, 0, 0].mean(1) - 0.5
            return torch.stack([-middle, middle], 1)

    model = Brightness().eval()
    x = [torch.rand(3, h, w, generator=seeded(i)) for i, (h, w) in enumerate([(1, 1), (2, 3), (2, 3), (1, 1), (4, 4), (3, 2)])]
    expected = {i: alone(model, image, TARGETS, i) for i, image in enumerate(x)}
    assert certify(model, x, TARGETS) == expected
    assert any(claim.radius > 0 for claim in expected.values())


class Stochastic(HalfSpace):
    """A half-space whose logits are shaken by the global generator."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.2 * torch.randn(len(x), 2)


def test_a_stochastic_model_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    flat = half_space(side=2)
    model = Stochastic(flat.direction, flat.offset).eval()
    x = points(model, [0.3, 0.1, -0.2])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    together = certify(model, x, TARGETS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert certify(model, x[1:2], TARGETS, [1]) == {1: together[1]}
    assert certify(model, x[[2, 0]], TARGETS, [2, 0]) == {i: together[i] for i in (2, 0)}
    assert together[0].prediction == 1


def test_noise_differs_between_images_seeds_settings_and_questions_but_not_batch_sizes() -> None:
    def first(config: SmoothingConfig, sample_id: int = 0) -> Tensor:
        return next(noise_blocks(config, sample_id, torch.Size((3, 2, 2)))) / config.sigma

    same = first(TARGETS)
    assert torch.equal(first(replace(TARGETS, batch_size=64)), same)
    for other in (first(TARGETS, 1), first(replace(TARGETS, seed=1)), first(replace(TARGETS, sigma=0.5)), first(FIXED)):
        assert not torch.isclose(other, same).any()
    asked = Watching().eval()
    smoothed_predictions(asked, torch.full((1, 3, 2, 2), 0.5), TARGETS)
    assert not torch.isclose((asked.seen[0][: len(same)] - 0.5) / SIGMA, same).any()


# --- the budget ---------------------------------------------------------------------------------------------------------


class Shades(Watching):
    """Classes by the noise of one pixel around the shade of each image, a multiple of 0.1 that shows through little noise."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        noise = x[:, 0, 0, 0] - self.shade(x) / 10
        return torch.stack([-noise, noise + 0.004 * (self.shade(x) - 4)], 1)

    @staticmethod
    def shade(x: Tensor) -> Tensor:
        return (10 * x.mean(dim=(1, 2, 3))).round()


@pytest.mark.parametrize("batch_size", [8, 24, 200])
def test_each_image_uses_its_first_blocks_none_twice_and_none_skipped(batch_size: int) -> None:
    config = SmoothingConfig(sigma=0.01, n0=10, n=200, radii=(0.0, 0.005), alpha=0.05, beta=0.1, block=8, batch_size=batch_size)
    model = Shades().eval()
    x = torch.arange(1, 9).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 10
    claims = certify(model, x, config)
    seen = torch.cat(model.seen)
    assert all(len(batch) == batch_size // 8 * 8 for batch in model.seen)
    assert len(torch.unique(seen.flatten(1), dim=0)) == len(seen), "two copies alike: noise was used twice"
    assert len({claim.samples for claim in claims.values()}) > 2
    for i, image in enumerate(x):
        mine = seen[Shades.shade(seen) == i + 1].reshape(-1, 8, 3, 4, 4)
        blocks = noise_blocks(config, i, image.shape)
        stream = torch.stack([next(blocks) + image for _ in mine])
        assert torch.allclose(mine, stream, atol=1e-6)
        assert 16 <= claims[i].samples <= 8 * len(mine)  # of n0 = 10, two blocks
        assert claims[i] == alone(Shades().eval(), image, config, i)


def test_memory_is_one_batch_whatever_the_number_of_samples() -> None:
    model = Watching().eval()
    x = torch.full((3, 3, 224, 224), 0.5)
    config = SmoothingConfig(n=100_000, radii=(0.0, 0.25), n0=4, block=4, batch_size=15)
    claims = certify(model, x, config)
    assert all(claim.radius == 0.25 for claim in claims.values())
    assert {batch.shape for batch in model.seen} == {(12, 3, 224, 224)}
    largest = _largest_tensor(lambda: certify(Coin(1).eval(), x[:1], config))
    assert largest == 12 * 3 * 224 * 224


def _largest_tensor(work: Callable[[], Any]) -> int:
    """How many elements the largest tensor has that any operation made."""
    with Operations() as operations:
        work()
    return operations.largest


class Operations(TorchDispatchMode):
    """Notes the names of all operations and the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        result = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, result.numel() if isinstance(result, Tensor) else 0)
        return result


def test_nothing_waits_for_the_device_but_the_one_transfer_of_a_batch() -> None:
    """On a GPU each of these operations would; the transfer itself is ``.cpu()``, which on the CPU is no operation."""
    model = half_space(side=2)
    x = points(model, [0.1, 0.3, 0.6])
    with Operations() as operations:
        certify(model, x, TARGETS)
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "bincount", "unique", "masked_select", "_unique2"}
    assert not {name for name in operations.names if name.removeprefix("aten::").split(".")[0] in waiting}


def test_gradients_are_off_in_the_model_and_as_they_were_outside() -> None:
    modes = []

    class Spy(Watching):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return super().forward(x)

    for _ in SmoothingCertifier(Spy().eval(), TARGETS).certify(Sample(i, torch.full((3, 2, 2), 0.5)) for i in range(3)):
        assert torch.is_grad_enabled()
    assert not any(modes)


# --- judges and settings ------------------------------------------------------------------------------------------------


def tally(hits: int, n: int, runner_up: int = 0) -> Tally:
    return Tally(np.array([hits]), np.array([runner_up]), np.array([n]))


def test_the_fixed_judge_looks_once_and_gives_cohens_radius() -> None:
    judge = FixedSamples(500, 0.001, SIGMA)
    assert judge.next_look(0) == 500
    assert not judge.decided([None], tally(400, 499))[0]
    assert judge.decided([None], tally(400, 500))[0]
    assert judge.radius(None, 500, 500) == pytest.approx(SIGMA * float(ndtri(0.001 ** (1 / 500))))
    assert judge.radius(None, 250, 500) is None


def test_targets_out_of_reach_cost_nothing() -> None:
    """At sigma 0.12, Phi(r / sigma) is 1 in float64 from a radius of 1 on; no 4,000 samples show more than 0.35."""
    reach = replace(TARGETS, sigma=0.12, radii=(0.0, 0.25))
    beyond = replace(reach, radii=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 3.0))
    assert [*beyond.judge().radii] == [0.0, 0.25]
    model = Watching().eval()
    one, other = (certify(model, [torch.full((3, 2, 2), 0.5)], config)[0] for config in (reach, beyond))
    assert one == other
    assert one.radius == 0.25
    hopeless = certify(model, [torch.full((3, 2, 2), 0.5)], replace(reach, radii=(1.0, 2.0)))[0]
    assert hopeless == Claim(ABSTAIN, 0.0, hopeless.samples, 0.0)
    assert hopeless.samples == 64 + 32


def test_the_judges_of_the_settings() -> None:
    assert isinstance(TARGETS.judge(), TargetRadii)
    assert isinstance(LARGEST.judge(), GreatestRadius)
    assert FIXED.judge() == FixedSamples(480, 0.001, SIGMA)
    assert TARGETS.test() == SequentialTest(alpha=0.001, beta=0.01, max_samples=4000)


@pytest.mark.parametrize("n", [96, 320, 3200])
def test_the_sequential_judges_claim_what_the_tests_at_level_alpha_show_and_not_one_hit_less(n: int) -> None:
    largest = GreatestRadius(TARGETS.test(), SIGMA)
    for radius in (0.0, 0.25):
        need = int(least_hits(n, float(ndtr(radius / SIGMA)), 0.001))
        for hits, claimed in ((need, radius), (need - 1, None)):
            judge = replace(TARGETS, radii=(radius,)).judge()
            state = judge.start()
            judge.decided([state], tally(hits, n))
            assert judge.radius(state, hits, n) == claimed
            bound = float(lower_bound(hits, n, 0.001))
            state = largest.start()
            largest.decided([state], tally(hits, n))
            assert largest.radius(state, hits, n) == (pytest.approx(SIGMA * float(ndtri(bound))) if bound > 0.5 else None)
    pairs = n // 2
    need = int(least_hits(pairs, 0.5, 0.001))
    for hits, claimed in ((need, 0.0), (need - 1, None)):
        answers = MostProbable(TARGETS.test())
        state = answers.start()
        answers.decided([state], tally(hits, n, pairs - hits))
        assert answers.radius(state, hits, n) == claimed


def test_a_judge_sees_images_one_by_one() -> None:
    rng = np.random.default_rng(0)
    n = 32 * rng.integers(1, 100, 40)
    hits = rng.binomial(n, rng.uniform(0.4, 1, 40))
    runner_up = (n - hits) // 2
    for judge in (TARGETS.judge(), LARGEST.judge(), FIXED.judge(), MostProbable(TARGETS.test())):
        together = [judge.start() for _ in n]
        decided = judge.decided(together, Tally(hits, runner_up, n))
        for i in range(len(n)):
            state = judge.start()
            assert judge.decided([state], tally(int(hits[i]), int(n[i]), int(runner_up[i])))[0] == decided[i]
            assert judge.radius(state, int(hits[i]), int(n[i])) == judge.radius(together[i], int(hits[i]), int(n[i]))


@pytest.mark.parametrize(
    "values",
    [
        {"sigma": 0.0},
        {"sigma": math.nan},
        {"sigma": math.inf},
        {"n": 0},
        {"n0": 0},
        {"block": 0},
        {"batch_size": 0},
        {"batch_size": 31},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": math.nan},
        {"beta": 0.0},
        {"radii": (0.5, 0.25)},
        {"radii": (0.25, 0.25)},
        {"radii": (-0.1,)},
        {"radii": (math.nan,)},
        {"radii": (0.25, math.inf)},
    ],
)
def test_bad_settings(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="smoothing") as caught:
        SmoothingConfig(**values)
    assert "\n" not in str(caught.value)


def test_a_model_in_train_mode_and_unusable_logits() -> None:
    with pytest.raises(InputError, match="train mode"):
        SmoothingCertifier(Watching(), TARGETS)

    class Broken(HalfSpace):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits.where((logits[:, :1] > -0.6).expand_as(logits), torch.tensor(float("nan")))

    flat = half_space(side=2)
    model = Broken(flat.direction, flat.offset).eval()
    with pytest.raises(InputError, match="not finite on noisy images"):
        certify(model, points(model, [0.3]), FIXED)


def test_a_single_class_is_always_right() -> None:
    claims = certify(Coin(1).eval(), torch.full((2, 3, 1, 1), 0.5), TARGETS)
    assert {claim[:2] for claim in claims.values()} == {(0, 0.5)}
    assert smoothed_predictions(Coin(1).eval(), torch.full((2, 3, 1, 1), 0.5), TARGETS).tolist() == [0, 0]


# --- predictions --------------------------------------------------------------------------------------------------------


def test_predictions_are_right_or_abstain_and_cheap_where_clear() -> None:
    flat = half_space(side=2)
    model = Slabs(flat.direction, flat.offset).eval()
    distances = [-0.5, -0.3, -0.24, -0.2, 0.0, 0.1, 0.19, 0.21, 0.3, 0.5]
    answers = smoothed_predictions(model, points(model, distances), replace(TARGETS, n=2000, n0=256))
    p = np.array(
        [[ndtr((-0.2 - d) / SIGMA), ndtr((0.2 - d) / SIGMA) - ndtr((-0.2 - d) / SIGMA), ndtr((d - 0.2) / SIGMA)] for d in distances]
    )
    assert answers.dtype == torch.int64
    for answer, truth in zip(answers.tolist(), p.argmax(1).tolist(), strict=True):
        assert answer in (ABSTAIN, truth)
    assert answers[[0, 1, 4, 8, 9]].tolist() == [0, 0, 1, 2, 2]
    watched = Watching().eval()
    smoothed_predictions(watched, torch.full((1, 3, 2, 2), 0.5), replace(TARGETS, n=100_000))
    assert len(watched.seen) == 1


@pytest.mark.parametrize("sides", [2, 3])
def test_wrong_predictions_are_as_rare_as_alpha(sides: int) -> None:
    """All classes are equally probable; by calling any of them wrong, more is counted than the promise allows for."""
    alpha, trials = 0.2, 600
    config = SmoothingConfig(sigma=SIGMA, n0=32, n=640, alpha=alpha, beta=1e-4, batch_size=8192)
    answers = smoothed_predictions(Coin(sides).eval(), torch.full((trials, 3, 1, 1), 0.5), config)
    assert 0 < int((answers != ABSTAIN).sum()) <= trials * chance_of_more(alpha, trials)


def test_predictions_need_no_majority() -> None:
    """Two classes share what the third leaves: 40, 30, 30 per cent."""

    class Forty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            u = torch.special.ndtr((x[:, 0, 0, 0] - 0.5) / SIGMA)
            return nn.functional.one_hot((u > 0.3).long() + (u > 0.7).long(), 3).float()

    x = torch.full((10, 3, 1, 1), 0.5)
    assert smoothed_predictions(Forty().eval(), x, SmoothingConfig(sigma=SIGMA, n0=512)).tolist() == [1] * 10
    assert all(claim.prediction == ABSTAIN for claim in certify(Forty().eval(), x, TARGETS).values())


def test_a_prediction_is_that_of_the_image_alone() -> None:
    model, x = tiny_conv_net(), noisy_images(11)
    config = SmoothingConfig(sigma=0.5, n0=32, n=600, alpha=0.05)
    together = smoothed_predictions(model, x, config)
    assert torch.equal(smoothed_predictions(model, x[:4], config), together[:4])
    assert torch.equal(smoothed_predictions(model, x, replace(config, batch_size=64)), together)
    with pytest.raises(InputError, match=r"\[0,1\]"):
        smoothed_predictions(model, 2 * x, config)
