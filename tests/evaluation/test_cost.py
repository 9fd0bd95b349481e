import pytest
import torch
from evaluation_toys import Detecting, Images, Linear, images

from amsdn.attacks import Attack, EvadeDetector, PatchPGD, PGDAttack, SparsePGD, SquareAttack
from amsdn.attacks.compose import Cascade
from amsdn.evaluation.cost import Passes, Unshakable, planned_passes, planned_seconds
from amsdn.evaluation.evaluate import CLEAN, evaluate

SHAPE = (8, 8)


def planned(attack: Attack) -> tuple[float, float]:
    passes = planned_passes(attack, SHAPE, 10)
    return passes.forward, passes.backward


def test_plans_are_those_of_the_attacks_own_account() -> None:
    forwards, backwards = planned(PGDAttack(num_steps=7))
    assert (forwards, backwards) == (1 + 7 + 1, 7)  # the look before, the steps, the last image
    assert planned(SquareAttack(8 / 255, 100))[1] == 0
    assert planned(SquareAttack(8 / 255, 200))[0] - planned(SquareAttack(8 / 255, 100))[0] == 100


@pytest.mark.parametrize("attack", [PGDAttack(num_steps=4), SparsePGD(3, 4), PatchPGD(3, 4)], ids=lambda a: type(a).__name__)
def test_a_cascade_plans_the_sum_of_its_parts_on_images_that_resist(attack: Attack) -> None:
    one, two = planned(Cascade((attack,))), planned(Cascade((attack, attack)))
    assert two[1] == 2 * one[1] > 0


def test_evading_attacks_have_a_detector_to_climb_against() -> None:
    assert planned(EvadeDetector(PGDAttack(num_steps=4)))[1] >= 4


def test_no_attack_breaks_the_measuring_rod() -> None:
    x, y = torch.rand(4, 3, *SHAPE), torch.zeros(4, dtype=torch.int64)
    result = PGDAttack(epsilon=1.0, alpha=0.3, num_steps=20)(Unshakable(10).eval(), x, y)
    assert not result.success.any()


def test_a_random_model_plans_its_draws() -> None:
    attack = PGDAttack(num_steps=4, eot_samples=5)
    assert planned_passes(attack, SHAPE, 10, stochastic=True).backward == 5 * planned_passes(attack, SHAPE, 10).backward


def test_nothing_spends_more_than_was_planned(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The plan is an upper bound for a real model, on which images fall early."""
    model, attacks = Linear(), {"pgd": PGDAttack(num_steps=6), "sparse": SparsePGD(2, 5)}
    rows = evaluate(model.eval(), images(10, model), attacks, tmp_path, progress=False)
    for name, attack in attacks.items():
        bound = planned_passes(attack, (6, 6), 3)
        spent = [Passes(row.forwards, row.backwards) for row in rows if row.attack == name != CLEAN]
        assert spent
        assert all(passes.forward <= bound.forward and passes.backward <= bound.backward for passes in spent)


def test_seconds_are_there_for_every_attack_and_grow_with_its_steps() -> None:
    model: Detecting = Detecting()
    split: Images = images(6, model)
    found = planned_seconds(model.eval(), split, {"short": PGDAttack(num_steps=2), "long": PGDAttack(num_steps=60)}, 4)
    assert found["long"] > found["short"] > 0
