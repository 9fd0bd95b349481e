"""Every recipe holds together: its attacks have distinct settings, its headline budgets are attacked, its model can be built."""

import dataclasses

import pytest
import torch

from amsdn.data.augment import Augment
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import check_names
from amsdn.models.amsdn import AMSDN
from amsdn.recipes import DEFAULT, RECIPES, get_recipe
from amsdn.records import config_hash
from amsdn.training.adversarial_train import AdversarialTrainConfig

NAMES = sorted(RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_named_as_it_is_registered_and_says_what_it_costs(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert "\n" not in recipe.about
    assert "CPU" in recipe.about or "GPU" in recipe.about


@pytest.mark.parametrize("name", NAMES)
def test_attacks_are_distinct_and_reach_every_headline_budget_in_two_ways_for_local_threats(name: str) -> None:
    recipe = get_recipe(name)
    check_names(recipe.attacks)
    for family, budget in recipe.headline.items():
        at = [a for a in recipe.attacks.values() if a.threat.family == family and abs(float(a.threat.budget) - budget) < 1e-9]
        assert len(at) >= (2 if family in ("patch", "sparse") else 1), f"{family} {budget}: {at}"
        assert len({type(a) for a in at}) == len(at)


@pytest.mark.parametrize("name", NAMES)
def test_the_control_is_the_same_backbone_without_defence_trained_without_attacks(name: str) -> None:
    recipe = get_recipe(name)
    off = {"fpn": False, "attention": False, "purification": False}
    assert dataclasses.replace(recipe.model, **off) == recipe.control_model
    assert isinstance(recipe.control, AdversarialTrainConfig)
    assert recipe.control.attacks == ()
    assert recipe.control.augment == recipe.train.augment


@pytest.mark.parametrize("name", NAMES)
def test_the_model_runs_and_the_configuration_is_hashable(name: str) -> None:
    recipe = get_recipe(name)
    assert AMSDN.from_config(recipe.model).eval()(torch.rand(2, 3, 32, 32)).shape == (2, recipe.model.num_classes)
    assert len(config_hash(recipe.pretrain, recipe.train, recipe.finetune)) == 12


def test_digits_are_never_mirrored() -> None:
    recipe = get_recipe("digits-demo")
    for stage in (recipe.control, recipe.pretrain, recipe.train, recipe.finetune):
        assert stage.augment == Augment(flip=False, shift=2)


def test_unknown_recipes_are_refused_with_the_known_ones() -> None:
    assert DEFAULT in RECIPES
    with pytest.raises(InputError, match=DEFAULT):
        get_recipe("flagship")
