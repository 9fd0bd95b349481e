"""The AutoAttack cascade against the peer's, part by part at the same budget."""

import pytest
from comparison import assert_no_weaker, ours

from amsdn.attacks.suites import AutoAttack


@pytest.mark.slow
def test_autoattack(resnet, peer):
    settings, target = {"epsilon": 0.6 / 255, "num_steps": 10, "num_queries": 100}, resnet.first(24)
    theirs = peer("autoattack", "torchattacks", target, **settings)
    attack = AutoAttack(**settings)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat)


@pytest.mark.slow
def test_autoattack_on_a_small_amsdn(amsdn, peer):
    settings, target = {"epsilon": 6 / 255, "num_steps": 10, "num_queries": 100}, amsdn.first(40)
    theirs = peer("autoattack", "torchattacks", target, **settings)
    attack = AutoAttack(**settings)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat)
