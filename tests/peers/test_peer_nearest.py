"""Attacks that look for the nearest adversarial image, by distance, and FAB by what falls within the budget."""

import math

import pytest
from comparison import assert_no_farther, assert_no_weaker, length, ours, pixels

from amsdn.attacks import SigmaZero
from amsdn.attacks.carlini_wagner import CWL2
from amsdn.attacks.deepfool import DeepFool
from amsdn.attacks.fab import FABAttack, FABTargetedAttack


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_carlini_wagner(library, resnet, peer):
    target = resnet.first(40)
    theirs = peer("cw", library, target, num_steps=40, searches=5, initial_const=0.1, learning_rate=0.01)
    attack = CWL2(math.inf, num_steps=40, binary_search_steps=5, initial_const=0.1)
    assert_no_farther(target, ours(attack, target), theirs, length)


@pytest.mark.parametrize("library", ["torchattacks", "foolbox", "art"])
def test_deepfool(library, resnet, peer):
    """One numerical path in all libraries: 2 % apart is a tie, which clipping and rounding on the way explain."""
    target = resnet.first(30)
    theirs = peer("deepfool", library, target, num_steps=15, overshoot=0.02)
    assert_no_farther(target, ours(DeepFool(math.inf, num_steps=15), target), theirs, length, slack=0.02)


def test_deepfool_on_a_small_amsdn(amsdn, peer):
    theirs = peer("deepfool", "foolbox", amsdn.first(60), num_steps=20, overshoot=0.02)
    assert_no_farther(amsdn.first(60), ours(DeepFool(math.inf, num_steps=20), amsdn.first(60)), theirs, length, slack=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "make"), [("fab", FABAttack), ("fab-t", FABTargetedAttack)])
def test_fab(family, make, resnet, peer):
    settings, target = {"epsilon": 0.75 / 255, "num_steps": 10}, resnet.first(24)
    theirs = peer(family, "torchattacks", target, **settings)
    attack = make(**settings)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat)


@pytest.mark.parametrize("library", ["foolbox", "secml-torch"])
def test_sigma_zero_against_fmn(library, resnet, peer):
    """The peers have no sigma-zero; FMN-L0 is the nearest thing. It counts channel values, the comparison counts pixels."""
    target = resnet.first(40)
    theirs = peer("l0", library, target, num_steps=100)
    attack = SigmaZero(3 * 32 * 32, num_steps=100, stop_when_fooled=False)
    assert_no_farther(target, ours(attack, target), theirs, pixels)
