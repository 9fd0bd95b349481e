"""Each flaw is caught by the check that should catch it, and an honest network passes all of them."""

import pytest
import torch
from toys import FLAWS, DeadPlateau, Honest, LeakyDetector, ScaledUp, SecretDetector, images

from amsdn.evaluation.reliability import verdict
from amsdn.evaluation.reliability.model_checks import has_gradients, model_findings
from amsdn.models.amsdn import AMSDN, AMSDNConfig


@pytest.mark.parametrize("seed", range(20))
def test_an_honest_network_passes(seed: int) -> None:
    model, x = Honest(seed).eval(), images(24, seed)
    findings = model_findings(model, x, model(x).argmax(1))
    assert verdict(findings) == "yes"


@pytest.mark.parametrize("check", FLAWS)
@pytest.mark.parametrize("seed", range(5))
def test_a_flaw_is_caught_by_its_check(check: str, seed: int) -> None:
    inner, x = Honest(seed), images(24, seed)
    torch.manual_seed(seed)
    findings = model_findings(FLAWS[check](inner).eval(), x, inner(x).argmax(1))
    failed = {finding.check: finding.told for finding in findings if not finding.passed}
    assert check in failed
    assert verdict(findings).startswith("no, because ")
    assert failed[check] in verdict(findings)


@pytest.mark.parametrize("flaw", [ScaledUp, DeadPlateau])
def test_gradients_that_vanish_in_rounding_or_on_a_plateau_are_missed(flaw: type) -> None:
    inner, x = Honest(), images(24)
    assert not has_gradients(flaw(inner).eval(), x, inner(x).argmax(1)).passed


@pytest.mark.parametrize("flaw", [LeakyDetector, SecretDetector])
@pytest.mark.parametrize("seed", range(5))
def test_a_detector_that_leaks_or_decides_in_secret_is_caught(flaw: type, seed: int) -> None:
    inner, x = Honest(seed), images(24, seed)
    found = {f.check: f.passed for f in model_findings(flaw(inner).eval(), x, inner(x).argmax(1))}
    assert [check for check, passed in found.items() if not passed] == ["detects openly"]


def test_amsdn_passes_by_its_surrogate() -> None:
    torch.manual_seed(0)
    model = AMSDN.from_config(AMSDNConfig(num_classes=4, variant="compact", width=4, fpn_channels=8, consistency_samples=4)).eval()
    x = torch.rand(12, 3, 16, 16)
    assert verdict(model_findings(model, x, model(x).argmax(1))) == "yes"


def test_a_model_that_says_it_is_random_need_not_repeat() -> None:
    model = FLAWS["repeats"](Honest()).eval()
    model.stochastic = True  # type: ignore[assignment]
    found = {finding.check: finding for finding in model_findings(model, images(12), torch.zeros(12, dtype=torch.int64))}
    assert found["repeats"].passed
    assert found["judges alone"].passed
