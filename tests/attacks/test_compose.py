"""Composites: what they keep, what they refuse, and for how long they attack an image that is fooled already."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attack_toys import Linear, images, small_net
from torch import Tensor, nn

from amsdn.attacks import (
    ATTACKS,
    CWL2,
    FGSM,
    MIFGSM,
    NFGSM,
    Attack,
    Cascade,
    DeepFool,
    FABAttack,
    FABL2Attack,
    FABTargetedL2Attack,
    Goal,
    MaskingAwarePatch,
    PGDAttack,
    PGDL2Attack,
    RandomNoise,
    Restarts,
    SigmaZero,
    SparsePGD,
    Targeted,
    Victim,
    base,
    make_attack,
)
from amsdn.attacks.base import ActiveSet
from amsdn.attacks.minimal_norm import MinimalNorm
from amsdn.attacks.physical import DIGITAL
from amsdn.attacks.universal_patch import worst_of_draws
from amsdn.errors import InputError
from amsdn.models.double_masking import DoubleMasking
from amsdn.threats import L2Ball, LinfBall, PatchRegion


@dataclass(frozen=True)
class Reach(MinimalNorm):
    """Walks against a linear model by a given length per image, a stand-in for a search that finds something of that size."""

    epsilon: float = math.inf
    lengths: tuple[float, ...] = ()

    @property
    def threat(self) -> L2Ball:
        return L2Ball(self.epsilon)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        gradient, _, _ = victim.gradient(x, lambda logits: -logits[:, 0])
        length = torch.tensor(self.lengths)[victim.rows].reshape(-1, 1, 1, 1)
        return self.threat_on(victim).project(x + length * gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1), x)


def at_distance(distance: float, count: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model and one image, ``count`` times, whose nearest boundary is that far in L2, clear of the walls of the box."""
    x, model = torch.full((count, 3, 8, 8), 0.5), Linear()
    model.bias = 0.0
    model.bias = distance * float(model.w.detach().norm()) - float(model(x[:1]).detach()[0, 0])
    return model, x, torch.zeros(count, dtype=torch.int64)


LONG, SHORT, FAILS = 0.9, 0.4, 0.1
FIRST, SECOND = Reach(lengths=(LONG, SHORT, FAILS, FAILS)), Reach(lengths=(SHORT, LONG, SHORT, FAILS))


@pytest.mark.parametrize("order", [(FIRST, SECOND), (SECOND, FIRST)])
@pytest.mark.parametrize(("budget", "stop"), [(math.inf, True), (math.inf, False), (2.0, False)])
def test_minimal_norm_parts_give_the_smallest_change_of_any(order: tuple[Attack, ...], budget: float, stop: bool) -> None:
    model, x, y = at_distance(0.3)
    parts = tuple(dataclasses.replace(part, epsilon=budget) for part in order)  # type: ignore[call-arg]
    result = Cascade(parts, stop_when_fooled=stop)(model, x, y)
    assert result.success.tolist() == [True, True, True, False]
    torch.testing.assert_close(result.spent[:3], torch.full((3,), SHORT))
    assert result.backwards.tolist() == [2] * 4  # every part starts from all samples


def test_with_a_finite_budget_a_fooled_image_leaves() -> None:
    model, x, y = at_distance(0.3)
    result = Cascade((dataclasses.replace(FIRST, epsilon=2.0), dataclasses.replace(SECOND, epsilon=2.0)))(model, x, y)
    torch.testing.assert_close(result.spent[:3], torch.tensor([LONG, SHORT, SHORT]))
    assert result.backwards.tolist() == [1, 1, 2, 2]
    each = torch.tensor([2.0, math.inf, 2.0, 2.0])  # the second searches to the end
    mixed = Cascade(tuple(dataclasses.replace(part, epsilon=each) for part in (SECOND, FIRST)))(model, x, y)
    torch.testing.assert_close(mixed.spent[:3], torch.full((3,), SHORT))
    assert mixed.backwards.tolist() == [1, 2, 1, 2]


def test_cascades_of_real_searches_are_no_worse_than_any_part() -> None:
    net, x = small_net(), images()
    y = net(x).argmax(1)
    parts = DeepFool(math.inf), CWL2(math.inf, 10, 2, initial_const=1.0), FABTargetedL2Attack(math.inf, 3, n_targets=2)
    each = torch.stack([part(net, x, y).spent.masked_fill(~part(net, x, y).success, math.inf) for part in parts])
    assert (each[0] > each.amin(0)).all()
    together = Cascade((parts[0], Cascade(parts[1:])))(net, x, y)
    assert together.success.all()
    torch.testing.assert_close(together.spent, each.amin(0))
    pixels = Cascade((SigmaZero(math.inf, 10), SigmaZero(math.inf, 20, 0.5)))(net, x, y).spent  # type: ignore[arg-type]
    alone = [SigmaZero(math.inf, 10)(net, x, y), SigmaZero(math.inf, 20, 0.5)(net, x, y)]  # type: ignore[arg-type]
    assert torch.equal(pixels, torch.stack([r.spent.masked_fill(~r.success, math.inf) for r in alone]).amin(0))


@dataclass(frozen=True)
class Drawn(Reach):
    """Finds something of a random size."""

    @property
    def randomised(self) -> bool:
        return True

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        lengths = 0.35 + 0.6 * torch.rand(len(x), generator=generator)
        return dataclasses.replace(FIRST, lengths=tuple(lengths.tolist())).perturb(victim, x, goal, generator)


@pytest.mark.parametrize("stop", [True, False])
def test_restarts_of_a_minimal_norm_search_keep_the_smallest(stop: bool) -> None:
    model, x, y = at_distance(0.3)
    result = Restarts(Drawn(), 5, stop_when_fooled=stop)(model, x, y, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([torch.rand(4, generator=g) for g in [torch.Generator().manual_seed(0)] for _ in range(5)])
    assert len(drawn.argmin(0).unique()) > 1
    torch.testing.assert_close(result.spent, 0.35 + 0.6 * drawn.amin(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cascade((FABL2Attack(math.inf), PGDL2Attack(math.inf))),
        lambda: Cascade((FABAttack(torch.tensor([0.1, math.inf])), PGDAttack(torch.tensor([0.1, math.inf])))),  # type: ignore[arg-type]
        lambda: Restarts(PGDAttack(math.inf), 2),
        *(lambda name=name: make_attack(name, epsilon=math.inf) for name in ATTACKS if name.startswith(("apgd", "square", "autoattack"))),
        *(lambda name=name: make_attack(name, k=math.inf) for name in ("sparse-pgd", "sparse-rs", "sparse-rs-guided", "sparse-autoattack")),
    ],
)
def test_attacks_laid_out_by_their_budget_need_a_finite_one(make: Callable[[], Attack]) -> None:
    with pytest.raises(InputError, match="the budget must be finite") as e:
        make()
    assert "\n" not in str(e.value)


DETERMINISTIC = [FGSM(), MIFGSM(), PGDAttack(random_start=False), FABL2Attack(), FABTargetedL2Attack(), DeepFool(), CWL2(), SigmaZero()]


@pytest.mark.parametrize("attack", [*DETERMINISTIC, Cascade((FGSM(), FABAttack())), Targeted(FGSM())])
def test_restarts_of_one_and_the_same_run_are_refused(attack: Attack) -> None:
    with pytest.raises(InputError, match="random_start=True") as e:
        Restarts(attack, 2)
    assert "\n" not in str(e.value)
    assert Restarts(attack, 1).attack is attack


@pytest.mark.parametrize("attack", [NFGSM(), MIFGSM(random_start=True), PGDAttack(), FABAttack(n_restarts=2), SparsePGD()])
def test_restarts_of_random_runs_are_not(attack: Attack) -> None:
    assert Restarts(attack, 2).randomised


@pytest.mark.parametrize("name", ATTACKS)
def test_what_calls_itself_random_depends_on_the_seed(name: str) -> None:
    short = {
        "num_steps": 3,
        "num_queries": 5,
        "guided_queries": 3,
        "tries": 3,
        "restarts": 2,
        "binary_search_steps": 2,
        "random_start": None,
    }
    attack = ATTACKS[name]()
    given: dict[str, Any] = {k: v for k, v in short.items() if hasattr(attack, k) and v is not None}
    attack = dataclasses.replace(attack, **given)
    model, x, y = at_distance(50.0, 2)  # nobody fools it, so no search ends early
    first, second = (attack(model, x, y, generator=torch.Generator().manual_seed(seed)).x_adv for seed in (0, 1))
    if not attack.randomised:
        assert torch.equal(first, second)
    elif not name.startswith(("adv-patch", "autoattack", "apgd")):  # a linear model's optimum may be the same from any start
        assert not torch.equal(first, second)


def noise(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return RandomNoise(LinfBall(0.5), 20)(net, x, y).forwards


def pasted(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    active = ActiveSet(Victim.of(net, len(x), x.device), x, Goal(y), PatchRegion(10))
    victim, content = active.victim, torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))
    worst_of_draws(active, content, 10, DIGITAL, 20, torch.Generator().manual_seed(0))
    return victim.forwards


def masked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    defence = DoubleMasking(net, patch=8, masks_per_axis=2).eval()
    attack = MaskingAwarePatch(8, 6, majority_places=3, confirming_places=1, views_per_step=2, check_every=2)
    return attack(defence, x, defence(x).argmax(1)).forwards


@pytest.mark.parametrize("run", [noise, pasted, masked])
def test_an_accelerator_is_asked_as_often_where_records_are_rare(run: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = small_net(), images(12)
    y = net(x).argmax(1)
    forwards = run(net, x, y)
    assert len(forwards.unique()) > 1  # some leave before others
    monkeypatch.setattr(base, "_poll_every", lambda device: 8)
    assert torch.equal(run(net, x, y), forwards)


@pytest.mark.parametrize("attack", [PGDAttack, FGSM, FABAttack, SparsePGD, SigmaZero])
@pytest.mark.parametrize("count", [3, 5])
def test_budgets_of_another_number_than_images(attack: Callable[..., Attack], count: int) -> None:
    net, x = small_net(), images(4)
    y = net(x).argmax(1)
    for made in (attack(torch.ones(count)), Cascade((attack(torch.ones(count)),)), Targeted(attack(torch.ones(count)))):
        for run in (lambda a: a(net, x, y), lambda a: a.craft(net, x, y, torch.Generator())):
            with pytest.raises(InputError, match=rf"budgets \[{count}\] for 4 images") as e:
                run(made)
            assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"budgets \[\] for 4 images"):
        attack(torch.tensor(1.0))(net, x, y)
