"""Draws follow the running errors as last fetched; the errors follow their recursion; nothing is lost on the way through a state."""

import copy
from typing import Any

import pytest
import torch

from amsdn.attacks import Attack, PatchPGD, PGDAttack, SparsePGD
from amsdn.errors import InputError
from amsdn.training.attack_mix import AttackSampler, ErrorProportional, UniformMix, draw
from amsdn.training.attack_ranges import PatchSizes, PixelCounts

ATTACKS: tuple[Attack, ...] = (PatchPGD(4), SparsePGD(5), PGDAttack())


def host(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def met(sampler: AttackSampler, chosen: int, error: float) -> dict[str, torch.Tensor]:
    return sampler.memory(chosen, torch.tensor(error))


def test_draws_are_in_proportion_to_the_weights() -> None:
    gen = host()
    counts = torch.bincount(torch.tensor([draw([1, 3, 0], gen) for _ in range(4000)]), minlength=3) / 4000
    assert counts[2] == 0
    assert abs(float(counts[1]) - 0.75) < 0.03


def test_uniform_weights_ignore_the_errors_and_proportional_ones_have_a_floor() -> None:
    assert UniformMix().weights([0.1, 0.9, 0.0]) == [1, 1, 1]
    assert ErrorProportional(floor=0.2).weights([0.1, 0.9, 0.0]) == [0.2, 0.9, 0.2]


def test_running_errors_follow_their_recursion_for_the_attacks_that_were_met() -> None:
    sampler = AttackSampler(ATTACKS, ErrorProportional(momentum=0.9))
    sampler.remember([met(sampler, 1, 0.8)])
    torch.testing.assert_close(sampler.errors, torch.tensor([0.5, 0.9 * 0.5 + 0.1 * 0.8, 0.5]))
    # Parts of one step count once, by the mean of those that met the attack.
    sampler.remember([met(sampler, 1, 0.2), met(sampler, 1, 0.4), met(sampler, 2, 1.0)])
    torch.testing.assert_close(sampler.errors, torch.tensor([0.5, 0.9 * 0.53 + 0.1 * 0.3, 0.9 * 0.5 + 0.1 * 1.0]))
    before = sampler.errors.clone()
    sampler.remember([{}, {}])  # a step without attacks
    assert torch.equal(sampler.errors, before)
    assert sampler.steps == 2


def test_draws_use_the_errors_as_last_fetched_and_follow_them_from_the_refresh_on() -> None:
    sampler = AttackSampler(ATTACKS, ErrorProportional(momentum=0.0, refresh=4, floor=1e-9))
    for step, (chosen, error) in enumerate([(0, 0.0), (1, 0.0), (2, 0.25), (0, 0.0)], start=1):
        assert {sampler.draw(host(seed))[0] for seed in range(30)} == {0, 1, 2}, f"stale until step 4, not refreshed before step {step}"
        sampler.remember([met(sampler, chosen, error)])
    assert sampler.fetched == [0.0, 0.0, 0.25]
    assert {sampler.draw(host(seed))[0] for seed in range(30)} == {2}


def test_parts_have_memories_of_the_same_keys_and_shapes_whatever_they_met() -> None:
    sampler = AttackSampler(ATTACKS, UniformMix())
    kinds = {tuple((k, v.shape, v.dtype) for k, v in met(sampler, chosen, 0.3).items()) for chosen in range(3)}
    assert len(kinds) == 1


@pytest.mark.parametrize("cut", [1, 6, 9, 13])
def test_a_resumed_run_draws_what_the_undisturbed_run_draws(cut: int) -> None:
    def steps(sampler: AttackSampler, start: int, stop: int) -> list[int]:
        drawn = []
        for step in range(start, stop):
            chosen, _ = sampler.draw(host(step))
            sampler.remember([met(sampler, chosen, [0.0, 1.0, 0.0][chosen])])  # draws by fresh errors would soon be all of number 1
            drawn.append(chosen)
        return drawn

    mix = ErrorProportional(momentum=0.1, refresh=10, floor=1e-6)
    whole = AttackSampler(ATTACKS, mix)
    expected = steps(whole, 0, 30)
    assert set(expected[:10]) == {0, 1, 2}
    first, second = AttackSampler(ATTACKS, mix), AttackSampler(ATTACKS, mix)
    drawn = steps(first, 0, cut)
    second.load(copy.deepcopy(first.state()))
    assert drawn + steps(second, cut, 30) == expected
    assert torch.equal(second.errors, whole.errors)


def test_a_range_among_the_attacks_gives_one_of_its_own() -> None:
    sampler = AttackSampler((PatchSizes((3, 5)), PixelCounts(2, 9)), UniformMix())
    attacks = [sampler.draw(host(seed))[1] for seed in range(100)]
    assert {a.size for a in attacks if isinstance(a, PatchPGD)} == {3, 5}
    assert {a.k for a in attacks if isinstance(a, SparsePGD)} == set(range(2, 10))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (UniformMix, {"momentum": 1.0}),
        (UniformMix, {"refresh": 0}),
        (ErrorProportional, {"momentum": -0.1}),
        (ErrorProportional, {"floor": 0.0}),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind: type[UniformMix], wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="mix: "):
        kind(**wrong)
