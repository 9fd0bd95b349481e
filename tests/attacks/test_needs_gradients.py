"""Whether an attack follows gradients: every one says so, and one that does is refused by a model that has none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_toys import images
from torch import Tensor, nn

from amsdn.attacks import ATTACKS, AdvPatch, Attack, Cascade, EvadeDetector, PGDAttack, PGDL1Attack, RandomNoise, Restarts, SquareAttack
from amsdn.attacks.black_box import search_within, searches
from amsdn.attacks.targeting import Targeted
from amsdn.attacks.universal_patch import ApplyPatch, UniversalPatch
from amsdn.errors import InputError
from amsdn.protocols import is_black_box
from amsdn.threats import L1Ball, L2Ball, LinfBall, PatchRectangles, PatchRegion, SparsePixels

QUICK = {"num_steps": 4, "num_queries": 30, "tries": 4, "guided_queries": 10}


def quick(name: str) -> Attack:
    attack = ATTACKS[name]()
    fields = {f.name for f in dataclasses.fields(attack)}
    return dataclasses.replace(attack, **{k: v for k, v in QUICK.items() if k in fields})


class Numpy(nn.Module):
    """Answers by numpy, so that no gradient comes through, and can be pushed but never fooled: class 0 leads by 1e4."""

    def __init__(self) -> None:
        super().__init__()
        self.w = np.random.default_rng(0).normal(size=3 * 16 * 16).astype(np.float32)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = x.detach().numpy().reshape(len(x), -1) @ self.w
        return torch.from_numpy(np.stack([1e4 + score, -score, np.zeros_like(score)], 1))


class Declared(Numpy):
    """The same, saying so."""

    black_box = True


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_says_that_it_needs_gradients_if_and_only_if_it_asks_for_one(name: str) -> None:
    x = images(3)
    y = torch.zeros(3, dtype=torch.int64)
    attack = quick(name)
    result = attack(Numpy(), x, y)
    assert not result.success.any()
    assert (result.forwards > 1).all()
    assert attack.needs_gradients == bool((result.backwards > 0).all())
    assert attack.needs_gradients == bool((result.backwards > 0).any())


@pytest.mark.parametrize("name", ATTACKS)
def test_a_black_box_refuses_gradients_and_meets_every_search(name: str) -> None:
    x = images(2)
    y = torch.zeros(2, dtype=torch.int64)
    attack = quick(name)
    if not attack.needs_gradients:
        same, declared = attack(Numpy(), x, y), attack(Declared(), x, y)
        assert torch.equal(same.x_adv, declared.x_adv)
        return
    for model in (Declared(), nn.Sequential(nn.Identity(), Declared()).eval()):  # what stands around a black box is one
        for run in (lambda m=model: attack(m, x, y), lambda m=model: attack.craft(m, x, y, torch.Generator())):
            with pytest.raises(InputError, match=f"{type(attack).__name__}: follows gradients") as error:
                run()
            assert "\n" not in str(error.value)


def test_what_holds_attacks_needs_what_they_need(tmp_path: Path) -> None:
    square, pgd = SquareAttack(num_queries=10), PGDAttack()
    for inside in (square, pgd):
        for outside in (Restarts(inside, 2), Cascade((inside,)), Targeted(inside), EvadeDetector(inside), Targeted(EvadeDetector(inside))):
            assert outside.needs_gradients == inside.needs_gradients
    assert Cascade((RandomNoise(), pgd)).needs_gradients
    assert not Cascade((RandomNoise(), square)).needs_gradients
    UniversalPatch(torch.zeros(3, 8, 8), {}).save(tmp_path / "patch.png")
    assert not ApplyPatch(tmp_path / "patch.png").needs_gradients


def test_a_patch_is_not_learned_on_a_black_box() -> None:
    with pytest.raises(InputError, match=r"AdvPatch.fit: follows gradients"):
        AdvPatch(4, 2).fit(Declared(), images(2), torch.zeros(2, dtype=torch.int64))


def test_a_black_box_is_what_declares_it() -> None:
    assert is_black_box(Declared())
    assert is_black_box(nn.Sequential(nn.Sequential(Declared())))
    assert not is_black_box(Numpy())
    assert not is_black_box(lambda x: x)
    function = lambda x: x  # noqa: E731
    function.black_box = True  # type: ignore[attr-defined]
    assert is_black_box(function)


@pytest.mark.parametrize(
    "threat", [PatchRegion(3), PatchRectangles(2, 4), PatchRectangles(2, 2, 3), SparsePixels(5), LinfBall(8 / 255), L2Ball(0.5)]
)
def test_each_threat_is_searched_without_gradients(threat: PatchRegion) -> None:
    attack = search_within(threat, 20)
    assert attack is not None
    assert attack.threat.includes(threat)
    assert threat.includes(attack.threat)
    assert not attack.needs_gradients
    result = attack(Declared(), images(2), torch.zeros(2, dtype=torch.int64))
    assert (result.forwards == 21).all()


def test_threats_that_none_of_our_searches_covers_are_left_out() -> None:
    assert search_within(L1Ball(12.0)) is None
    assert search_within(LinfBall(torch.inf)) is None
    found = searches([PGDAttack().threat, LinfBall(8 / 255), PGDL1Attack().threat, PatchRegion(5)])
    assert list(found) == ["search-linf-8-255", "search-patch-5"]
