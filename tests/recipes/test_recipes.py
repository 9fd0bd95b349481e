"""Every recipe holds together: its attacks have distinct settings, its headline budgets are attacked, its model can be built."""

import dataclasses
from pathlib import Path

import pytest
import torch

from amsdn.commands.options import parse
from amsdn.commands.training import TrainOptions
from amsdn.data.augment import Augment
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import check_names
from amsdn.models.amsdn import AMSDN
from amsdn.recipes import DEFAULT, RECIPES, get_recipe
from amsdn.records import config_hash
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.views import CertifiableViews

NAMES = sorted(RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_is_named_as_it_is_registered_and_says_what_it_costs(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    assert "\n" not in recipe.about + recipe.cost + recipe.expected
    assert any(word in recipe.cost for word in ("measured", "not run"))
    assert any(word in recipe.expected for word in ("results/", "measured"))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("cifar10-") and get_recipe(n).budget])
def test_gpu_recipes_come_for_thirty_minutes_and_for_ten(name: str) -> None:
    assert get_recipe(name).budget == ("10min" if name.endswith("-10min") else "30min")
    assert {name.removesuffix("-10min"), f"{name.removesuffix('-10min')}-10min"} <= RECIPES.keys()


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
    off = {"fpn": False, "attention": False, "purification": False, "bounded_evidence": False}
    assert dataclasses.replace(recipe.model, **off) == recipe.control_model
    assert isinstance(recipe.control, AdversarialTrainConfig)
    assert recipe.control.attacks == ()
    assert recipe.control.augment == recipe.train.augment


@pytest.mark.parametrize("name", NAMES)
def test_the_model_runs_and_the_configuration_is_hashable(name: str) -> None:
    recipe = get_recipe(name)
    model = AMSDN.from_config(dataclasses.replace(recipe.model, pretrained=False))
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, recipe.model.num_classes)
    assert len(config_hash(recipe.pretrain, recipe.train, recipe.finetune)) == 12


@pytest.mark.parametrize("name", NAMES)
def test_some_stage_shows_what_the_certificates_ask(name: str) -> None:
    recipe = get_recipe(name)

    def suits(views: CertifiableViews) -> bool:
        masks = {(c.patch, c.masks_per_axis) for c in views.cutouts if views.masked > 0}
        met = {
            "l2": views.noised > 0 and recipe.smoothing.sigma in views.sigmas,
            "patch": (recipe.patch.size, recipe.patch.masks_per_axis) in masks,
            "l0": views.ablated > 0 and (recipe.pixels.rows, recipe.pixels.columns) in views.parts.grids,
        }
        return all(met[kind] for kind in recipe.certificates)

    assert any(suits(stage.views) for stage in (recipe.train, recipe.finetune))


def test_the_certified_recipe_is_trained_by_one_command_without_attacks() -> None:
    recipe = get_recipe("cifar10-certified")
    assert recipe.train.attacks == ()
    assert recipe.train.views.consistency == 0, "a second noisy copy would double the cost of noise"
    assert all(c.candidates == 1 for c in recipe.train.views.cutouts), "random masks cost no pass"
    assert {c.masks_per_axis for c in recipe.train.views.cutouts} == {3, 6}


@pytest.mark.parametrize("name", NAMES)
def test_views_are_flags_of_the_commands(name: str) -> None:
    recipe = get_recipe(name)
    defaults = TrainOptions(data=recipe.data, out=Path("out"), model=recipe.model, stage=recipe.train)
    read = parse(defaults, ["--views.masked", "0", "--views.cutouts.0.candidates", "2", "--views.sigmas", "0.1", "0.5"], "train", "")
    assert read.stage.views.masked == 0
    assert read.stage.views.cutouts[0].candidates == 2
    assert read.stage.views.sigmas == (0.1, 0.5)


def test_digits_are_never_mirrored() -> None:
    recipe = get_recipe("digits-demo")
    for stage in (recipe.control, recipe.pretrain, recipe.train, recipe.finetune):
        assert stage.augment == Augment(flip=False, shift=2)


def test_unknown_recipes_are_refused_with_the_known_ones() -> None:
    assert DEFAULT in RECIPES
    with pytest.raises(InputError, match=DEFAULT):
        get_recipe("flagship")
