import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_toys import HalfSpace, Images
from torch import Tensor

from amsdn.attacks.gradient_attacks import PGDAttack, PGDL2Attack
from amsdn.errors import InputError
from amsdn.evaluation.certification import certify_split
from amsdn.evaluation.certifier import ABSTAIN
from amsdn.evaluation.crosscheck import CertificateViolation, conclude
from amsdn.evaluation.smoothing import SmoothedClassifier
from amsdn.evaluation.smoothing_attack import SMOOTHED_PGD, Check, RecheckConfig, checked, false_alarm_bound, recheck_smoothed, smoothed_pgd
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.records import CertRecord

SIDE = 4


def half_space() -> HalfSpace:
    direction = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return HalfSpace(direction, float(0.5 * direction.sum() / direction.norm())).eval()


def points(model: HalfSpace, distances: list[float]) -> Tensor:
    grey = torch.full((len(distances), 3, SIDE, SIDE), 0.5)
    step = torch.tensor(distances) - model.distance(grey)
    return grey + step.reshape(-1, 1, 1, 1) * model.direction.reshape(3, SIDE, SIDE)


def test_smoothed_pgd_finds_the_worst_point_of_a_half_space() -> None:
    """The optimum is closed form: straight towards the plane, by the whole radius, whichever side x is on."""
    model = half_space()
    distances = torch.tensor([0.3, -0.4, 0.2])
    radius = torch.tensor([0.2, 0.3, 0.05])
    x = points(model, distances.tolist())
    found = smoothed_pgd(SmoothedClassifier(model, 0.25), x, (distances > 0).long(), radius, torch.Generator().manual_seed(0))
    assert ((found - x).flatten(1).norm(dim=1) <= radius + 1e-6).all()
    moved = (distances - model.distance(found)) * distances.sign()
    assert (moved > 0.98 * radius).all()


SMOOTHING = SmoothingConfig(sigma=0.25, n0=100, n=2000, fixed=True, block=50)
ATTACKS = {"pgd-l2": PGDL2Attack(epsilon=0.5, alpha=0.1, num_steps=10)}


def certified(tmp_path: Path) -> tuple[SmoothedClassifier, Images, list[CertRecord]]:
    model = half_space()
    x = points(model, [0.3, -0.4, 0.2, 0.0])
    split = Images(x, torch.tensor([1, 0, 0, 1]))  # the third is certified for the wrong class, the last abstains
    return SmoothedClassifier(model, 0.25), split, certify_split(SmoothingCertifier(model, SMOOTHING), split, tmp_path, progress=False)


def test_sound_certificates_stand(tmp_path: Path) -> None:
    smoothed, split, certificates = certified(tmp_path)
    assert [c.prediction for c in certificates] == [1, 0, 1, ABSTAIN]
    checks = recheck_smoothed(smoothed, split, certificates, ATTACKS, progress=False)
    assert [(c.sample_id, c.attack) for c in checks] == [(i, name) for name in (SMOOTHED_PGD, "pgd-l2") for i in range(3)]
    assert not any(c.violated for c in checks)
    assert all(0.9 * c.radius < c.spent <= c.radius for c in checks)
    content = conclude(tmp_path, [checked(checks, SMOOTHING.alpha, 1e-6)])
    assert content == json.loads((tmp_path / "crosscheck.json").read_text())
    result = content["certificates"]["l2"]
    assert (content["violations"], result["violations"], result["samples"], result["checks"]) == (0, 0, 3, 6)
    assert result["false_alarm_bound"] == pytest.approx(3 * 0.001 + 6 * 1e-6)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_planted_false_certificate_fails_loudly(tmp_path: Path, batch_size: int) -> None:
    smoothed, split, certificates = certified(tmp_path)
    certificates[1] = replace(certificates[1], radius=0.6)  # the plane is 0.4 away
    checks = recheck_smoothed(smoothed, split, certificates, ATTACKS, RecheckConfig(batch_size=batch_size), progress=False)
    assert {(c.sample_id, c.attack) for c in checks if c.violated} == {(1, SMOOTHED_PGD), (1, "pgd-l2")}
    with pytest.raises(CertificateViolation, match=r"1 certified samples .* \[1\]; .*0\.003.* sample 1, l2 radius 0\.6") as caught:
        conclude(tmp_path, [checked(checks, SMOOTHING.alpha, 1e-6)])
    assert len(caught.value.violations) == 2
    assert json.loads((tmp_path / "crosscheck.json").read_text())["violations"] == 2  # the evidence is there all the same


def test_the_recheck_repeats_itself(tmp_path: Path) -> None:
    smoothed, split, certificates = certified(tmp_path)
    torch.rand(3)
    first = recheck_smoothed(smoothed, split, certificates, ATTACKS, progress=False)
    assert recheck_smoothed(smoothed, split, certificates, ATTACKS, progress=False) == first


def test_an_honest_doubt_is_no_violation(tmp_path: Path) -> None:
    """A true radius reaches the plane, where both answers are equally likely: the new prediction must abstain, not alarm."""
    smoothed, split, certificates = certified(tmp_path)
    certificates[0] = replace(certificates[0], radius=0.3)
    [check] = recheck_smoothed(smoothed, split, certificates[:1], progress=False)
    assert check.spent == pytest.approx(0.3, rel=1e-3)
    assert check.prediction == ABSTAIN
    assert not check.violated
    assert conclude(tmp_path, [checked([check], 0.001, 1e-6)])["certificates"]["l2"]["abstained"] == 1


@pytest.mark.parametrize("attacks", [{"pgd": PGDAttack(epsilon=0.1)}, {SMOOTHED_PGD: PGDL2Attack(epsilon=0.1)}])
def test_only_l2_attacks_under_their_own_name(tmp_path: Path, attacks: dict[str, PGDAttack]) -> None:
    smoothed, split, certificates = certified(tmp_path)
    with pytest.raises(InputError, match="must be an l2 attack"):
        recheck_smoothed(smoothed, split, certificates, attacks, progress=False)


def test_false_alarm_bound_is_a_probability() -> None:
    checks = [Check(i, "a", 1.0, 1.0, 0, 0) for i in range(5)]
    assert false_alarm_bound(checks, 0.5, 0.1) == 1.0
    assert false_alarm_bound([], 0.5, 0.1) == 0.0


def test_bad_settings() -> None:
    for values in ({"n": 0}, {"alpha": 0.0}, {"steps": 0}):
        with pytest.raises(InputError, match="recheck"):
            RecheckConfig(**values)  # type: ignore[arg-type]
