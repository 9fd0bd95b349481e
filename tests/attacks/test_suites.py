"""The standard cascades: what they consist of, that they take the per-image worst case, that their black-box part sees through masked gradients."""

import dataclasses

import pytest
import torch
from attack_toys import images, small_net
from torch import Tensor, nn

from amsdn.attacks import AutoAttack, AutoAttackL1, AutoAttackL2, PatchAutoAttack, SparseAutoAttack
from amsdn.attacks.compose import Composite
from amsdn.errors import InputError

SMALL = {"num_steps": 5, "num_queries": 60}
SUITES = [
    AutoAttack(0.01, **SMALL),
    AutoAttackL1(2.0, **SMALL),
    AutoAttackL2(0.15, **SMALL),
    SparseAutoAttack(2, guided_queries=20, **SMALL),
    PatchAutoAttack(2, **SMALL),
]


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: type(s).__name__)
def test_a_suite_is_the_worst_case_of_its_parts(suite: Composite) -> None:
    net, x = small_net(), images(16)
    y = net(x).argmax(1)
    everything, first = suite(net, x, y), suite.parts[0](net, x, y)
    assert 0 < first.success.sum() < 16
    assert (everything.success >= first.success).all()
    assert torch.equal(everything.x_adv[first.success], first.x_adv[first.success])  # what the first part broke, no other one meets
    standing = ~everything.success
    assert (everything.forwards[standing] > first.forwards[standing]).all()
    assert len(set(suite.parts)) == len(suite.parts) >= 2
    for part in suite.parts:
        assert suite.threat.includes(part.threat)
        assert part.threat.includes(suite.threat)


def test_autoattack_is_the_papers() -> None:
    apgd, targeted, fab, square = AutoAttack().parts
    assert [type(p).__name__ for p in (apgd, targeted, fab, square)] == [
        "APGDAttack", "APGDTargetedAttack", "FABTargetedAttack", "SquareAttack",
    ]  # fmt: skip
    assert (apgd.num_steps, targeted.num_steps, fab.num_steps, square.num_queries) == (100, 100, 100, 5000)  # type: ignore[attr-defined]
    assert (targeted.n_targets, fab.n_targets) == (9, 9)  # type: ignore[attr-defined]
    ce, dlr = AutoAttack(version="rand").parts
    assert (ce.eot_samples, dlr.eot_samples) == (20, 20)
    assert ce != dlr


def test_quick_budgets_differ_in_nothing_but_effort() -> None:
    for quick, full in ((SparseAutoAttack.quick(7), SparseAutoAttack(7)), (PatchAutoAttack.quick(7), PatchAutoAttack(7))):
        assert quick.threat == full.threat
        assert {type(part) for part in quick.parts} == {type(part) for part in full.parts}
        assert quick.num_steps <= full.num_steps
        assert quick.num_queries < full.num_queries
    quick, full = SparseAutoAttack.quick(), SparseAutoAttack()
    assert quick.guided_queries * quick.guided_restarts < full.guided_queries * full.guided_restarts


class Rounded(nn.Module):
    """A net behind rounding to 16 levels that does not declare it: gradients are zero everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 15).round() / 15)


@pytest.mark.parametrize(
    "suite", [AutoAttack(0.06, num_steps=5, num_queries=300), SparseAutoAttack(6, num_steps=5, num_queries=300, guided_queries=5)]
)
def test_search_breaks_what_hides_its_gradients(suite: Composite) -> None:
    net, x = Rounded(), images(12)
    y = net(x).argmax(1)
    white_box = dataclasses.replace(suite.parts[0], stop_when_fooled=True)(net, x, y)
    everything = suite(net, x, y)
    assert everything.success.sum() >= 2 * max(int(white_box.success.sum()), 1)


@pytest.mark.parametrize("settings", [{"version": "fast"}, {"num_steps": 0}, {"num_queries": 0}, {"n_targets": 0}, {"epsilon": 0.0}])
def test_unusable_settings(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(settings)).split("_")[0][:3]):
        AutoAttack(**settings)  # type: ignore[arg-type]
