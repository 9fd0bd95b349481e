"""What a protocol fixes stays fixed under its version."""

import json
from pathlib import Path

import pytest
import torch
from evaluation_toys import Detecting, Linear
from torch import Tensor, nn

from amsdn.attacks import HiddenViewPatch, MaskingAwarePatch
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import check_names
from amsdn.evaluation.protocol import EFFORTS, VERSION, Name, Protocol
from amsdn.models.double_masking import DoubleMasking
from amsdn.records import canonical, config_hash

FIXED = Path(__file__).with_name("protocol_versions.json")
SIDES = (32, 224)


class Everything(Detecting):
    """A toy that declares whatever a protocol may take notice of."""

    classifier = nn.Identity()
    fill = torch.full((1, 3, 1, 1), 0.5)

    def masks(self, height: int, width: int) -> Tensor:
        return torch.zeros(1, 1, height, width, dtype=torch.bool)

    def occluded_views(self) -> "Everything":
        return self


def fixed(name: Name, side: int) -> str:
    protocol = Protocol(name, side)
    effort, checks = protocol.effort, {threat: d.attacks() for threat, d in protocol.diagnoses().items()}
    attacks = {"white box": protocol.attacks(Everything()), "black box": protocol.black_box(), **checks}
    return config_hash(canonical(attacks), dict(protocol.headline), effort.samples, effort.checked, canonical(protocol.config))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", EFFORTS)
def test_what_is_measured_changes_only_with_the_version(name: Name, side: int) -> None:
    """If this fails, numbers would no longer be comparable: raise VERSION in protocol.py and add its line to protocol_versions.json."""
    assert json.loads(FIXED.read_text())[str(VERSION)][f"{name}-{side}"] == fixed(name, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", EFFORTS)
def test_attacks_have_names_of_their_own_and_reach_every_headline_budget(name: Name, side: int) -> None:
    protocol = Protocol(name, side)
    attacks = protocol.attacks(Everything())
    check_names(attacks)
    check_names(protocol.black_box())
    for family, budget in protocol.headline.items():
        at = [a for a in attacks.values() if a.threat.family == family and a.threat.budget == budget]
        assert len(at) >= 2, family  # the curve's and the cascade
        below = {float(a.threat.budget) for a in attacks.values() if a.threat.family == family}
        assert len(below) >= 3, f"no curve for {family}"
        assert any(a.threat.family == family and a.threat.budget == budget for a in protocol.black_box().values())
    assert not any(a.needs_gradients for a in protocol.black_box().values())
    assert protocol.diagnoses().keys() == protocol.headline.keys()
    for family, diagnosis in protocol.diagnoses().items():
        assert (diagnosis.attack.threat.family, diagnosis.attack.threat.budget) == (family, protocol.headline[family])


def test_a_defence_meets_the_attacks_that_know_it_and_no_other_does() -> None:
    protocol = Protocol("standard", 32)
    plain, all_of_it = protocol.attacks(Linear()), protocol.attacks(Everything())
    assert not any(a.evades for a in plain.values())
    assert {n for n in all_of_it if n not in plain} == {
        "patch-evading-5",
        "patch-hidden-view-5",
        "patch-masking-aware-5",
        "sparse-evading-20",
    }
    masked = protocol.attacks(DoubleMasking(Linear(), patch=5))
    assert any(isinstance(a, MaskingAwarePatch) for a in masked.values())
    assert not any(isinstance(a, HiddenViewPatch) for a in masked.values())


def test_more_thorough_protocols_spend_more() -> None:
    quick, standard, full = (EFFORTS[name] for name in ("quick", "standard", "full"))
    assert quick.samples < standard.samples <= full.samples
    assert quick.checked < standard.checked < full.checked
    assert quick.square_queries < standard.square_queries < full.square_queries


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InputError, match=r"--protocol hasty: no such protocol; choose one of quick, standard, full"):
        Protocol.named("hasty", 32)
