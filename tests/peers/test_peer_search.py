"""Black-box and pixel attacks against the peers', at equal numbers of queries."""

import pytest
from comparison import RANDOM_BOUND, assert_no_weaker, ours

from amsdn.attacks import FewPixelDE, PatchPGD, SparseRS
from amsdn.attacks.square_attack import SquareAttack, SquareL2Attack


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchattacks", "art"])
def test_square(library, resnet, peer):
    settings = {"epsilon": 4 / 255, "num_queries": 100}
    theirs = peer("square", library, resnet, **settings)
    attack = SquareAttack(**settings)
    assert_no_weaker(resnet, ours(attack, resnet), theirs, attack.threat, RANDOM_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "num_queries", "count"), [(1.0, 100, 182), (0.6, 500, 100)])
def test_square_l2(epsilon, num_queries, count, resnet, peer):
    """Few queries favour torchattacks' rule for the length of a window, more favour the paper's, which is ours."""
    settings, target = {"epsilon": epsilon, "num_queries": num_queries}, resnet.first(count)
    theirs = peer("square", "torchattacks", target, **settings, norm="L2")
    attack = SquareL2Attack(**settings)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat, RANDOM_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("attack", [FewPixelDE(3, population=60, num_steps=5), SparseRS(3, num_queries=360)])
def test_few_pixels(attack, resnet, peer):
    """torchattacks' one-pixel attack evolves a population of 60: 360 queries in six generations, for both of ours."""
    target = resnet.first(30)
    theirs = peer("few-pixel", "torchattacks", target, k=3, population=60, num_steps=5)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat, RANDOM_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("attack", [FewPixelDE(5, population=400, num_steps=1), SparseRS(5, num_queries=800)])
def test_few_pixels_of_art(attack, resnet, peer):
    """ART's population is fixed at 400: two generations are 800 queries."""
    target = resnet.first(20)
    theirs = peer("few-pixel", "art", target, k=5, population=400, num_steps=1)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat, RANDOM_BOUND)


@pytest.mark.slow
def test_patch(resnet, peer):
    """ART's patch, made for one image at a time at a fixed place, against ours, which also looks for the place."""
    target = resnet.first(24)
    theirs = peer("patch", "art", target, size=5, step=0.05, num_steps=25)
    attack = PatchPGD.racing(5, num_steps=25)
    assert_no_weaker(target, ours(attack, target), theirs, attack.threat, RANDOM_BOUND)
