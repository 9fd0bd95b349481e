"""One-step and plain iterative gradient attacks against the peers'."""

import pytest
from comparison import assert_no_weaker, ours

from amsdn.attacks import FGSM, MIFGSM, PGDAttack, PGDL1Attack, PGDL2Attack

EPS = 1 / 255
STEPS = {"epsilon": EPS, "alpha": EPS / 4, "num_steps": 10}
CASES = {
    "fgsm": (FGSM, {"epsilon": EPS}, ["torchattacks", "foolbox", "art"]),
    "pgd": (PGDAttack, STEPS, ["torchattacks", "foolbox", "art", "secml-torch"]),
    "pgd-l2": (PGDL2Attack, {"epsilon": 0.15, "alpha": 0.03, "num_steps": 10}, ["torchattacks", "foolbox", "art", "secml-torch"]),
    "pgd-l1": (PGDL1Attack, {"epsilon": 4.0, "alpha": 1.0, "num_steps": 10}, ["foolbox", "art"]),
    "mi-fgsm": (MIFGSM, STEPS, ["torchattacks", "foolbox", "art"]),
}
ON_RESNET = [(family, library) for family, (_, _, libraries) in CASES.items() for library in libraries]


@pytest.mark.parametrize(("family", "library"), ON_RESNET)
def test_on_the_public_resnet(family, library, resnet, peer):
    make, settings, _ = CASES[family]
    target = resnet.first(100)
    theirs = peer(family, library, target, **settings)
    attack = make(**settings)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat)


@pytest.mark.parametrize("library", ["torchattacks", "foolbox", "art", "secml-torch"])
def test_pgd_on_a_small_amsdn(library, amsdn, peer):
    settings = {"epsilon": 12 / 255, "alpha": 2 / 255, "num_steps": 10}
    theirs = peer("pgd", library, amsdn, **settings)
    attack = PGDAttack(**settings)
    assert_no_weaker(amsdn, ours(attack, amsdn), theirs, attack.threat)
