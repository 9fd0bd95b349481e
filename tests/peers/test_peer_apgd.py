"""Auto-PGD and the AutoAttack cascade against the peers'."""

import pytest
from comparison import assert_no_weaker, ours

from amsdn.attacks import APGDAttack, APGDL2Attack, APGDTargetedAttack, APGDTargetedL2Attack


@pytest.mark.parametrize("library", ["torchattacks", "art"])
def test_apgd_on_cross_entropy(library, resnet, peer):
    settings, target = {"epsilon": 1 / 255, "num_steps": 20}, resnet.first(100)
    theirs = peer("apgd-ce", library, target, **settings)
    attack = APGDAttack(**settings)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat)


@pytest.mark.parametrize("library", ["torchattacks", "art"])
def test_apgd_l2(library, resnet, peer):
    settings, target = {"epsilon": 0.15, "num_steps": 20}, resnet.first(60)
    theirs = peer("apgd-ce", library, target, **settings, norm="L2")
    attack = APGDL2Attack(**settings)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat)


@pytest.mark.parametrize(("norm", "attack"), [("Linf", APGDTargetedAttack(0.75 / 255, 10)), ("L2", APGDTargetedL2Attack(0.11, 10))])
def test_targeted_apgd(norm, attack, resnet, peer):
    target = resnet.first(40)
    theirs = peer("apgd-t", "torchattacks", target, epsilon=attack.epsilon, num_steps=attack.num_steps, norm=norm)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat)


def test_apgd_on_a_small_amsdn(amsdn, peer):
    settings = {"epsilon": 8 / 255, "num_steps": 20}
    theirs = peer("apgd-ce", "torchattacks", amsdn, **settings)
    attack = APGDAttack(**settings)
    assert_no_weaker(amsdn, ours(attack, amsdn), theirs, attack.threat)
