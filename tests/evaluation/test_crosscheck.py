import json
from pathlib import Path

import pytest
from evaluation_toys import cert_row, eval_row

from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN
from amsdn.evaluation.crosscheck import RESULT, CertificateViolation, Checked, Violation, conclude, cross_check
from amsdn.records import CertRecord, EvalRecord


def violations(rows: list[EvalRecord], certificates: list[CertRecord]) -> list[Violation]:
    return [v for result in cross_check(rows, certificates) for v in result.found]


def attacked(prediction: int, spent: float, family: str = "patch", sample_id: int = 0) -> EvalRecord:
    return eval_row(sample_id, "attack", correct=prediction == 1, prediction=prediction, family=family, budget=5.0, spent=spent)


@pytest.mark.parametrize(("certificate", "family"), [("patch", "patch"), ("l0", "sparse")])
def test_a_broken_certificate_is_found(certificate: str, family: str) -> None:
    [found] = violations([attacked(2, 5.0, family)], [cert_row(0, 5.0, certificate=certificate)])
    assert (found.sample_id, found.certificate, found.radius, found.certified_prediction) == (0, certificate, 5.0, 1)
    assert (found.attack, found.spent, found.prediction) == ("attack", 5.0, 2)


def test_a_wrong_but_certified_prediction_must_not_change_either() -> None:
    certificate = cert_row(0, 5.0, prediction=2, certificate="patch")
    assert violations([attacked(2, 5.0)], [certificate]) == []
    assert len(violations([attacked(1, 5.0)], [certificate])) == 1


@pytest.mark.parametrize(
    ("row", "certificate"),
    [
        (attacked(2, 5.0), cert_row(0, 4.0, certificate="patch")),  # went further than certified
        (attacked(1, 5.0), cert_row(0, 5.0, certificate="patch")),  # did not change the answer
        (attacked(2, 5.0, "sparse"), cert_row(0, 5.0, certificate="patch")),  # another threat
        (attacked(2, 5.0, sample_id=1), cert_row(0, 5.0, certificate="patch")),  # another sample
        (attacked(2, 5.0), cert_row(0, 5.0, prediction=ABSTAIN, certificate="patch")),  # no claim
        (attacked(2, 0.1, "l2"), cert_row(0, 0.5, certificate="l2")),  # a claim about the smoothed classifier
    ],
)
def test_what_contradicts_nothing(row: EvalRecord, certificate: CertRecord) -> None:
    assert violations([row], [certificate]) == []


def test_the_clean_prediction_is_inside_every_radius() -> None:
    assert len(violations([eval_row(0, correct=False)], [cert_row(0, 0.0, certificate="l0")])) == 1


@pytest.mark.parametrize("certificate", ["patch", "patch-detection"])
def test_a_patch_certificate_of_radius_zero_claims_nothing(certificate: str) -> None:
    wrong, failed = eval_row(0, correct=False, prediction=2), cert_row(0, 0.0, certificate=certificate)  # a near tie, rounded otherwise
    assert violations([wrong], [failed]) == []
    assert len(violations([wrong], [cert_row(0, 5.0, certificate=certificate)])) == 1


def test_an_image_that_was_not_attacked_is_not_counted_as_tried() -> None:
    untouched = [attacked(1, 0.0), attacked(1, 0.0, "sparse")]  # wrong before the attack, which left it alone
    certificates = [cert_row(0, 5.0, certificate="patch"), cert_row(0, 5.0, certificate="l0")]
    assert [(r.samples, r.checks) for r in cross_check(untouched, certificates)] == [(0, 0), (0, 0)]
    assert len(violations([attacked(2, 0.0)], certificates[:1])) == 1  # its answer counts all the same


def test_unknown_certificates_are_not_passed_over() -> None:
    with pytest.raises(InputError, match="unknown certificate 'l7'"):
        cross_check([], [cert_row(certificate="l7")])


def test_an_alarm_keeps_the_promise_of_detection_and_of_nothing_else() -> None:
    noticed = eval_row(0, "attack", correct=False, prediction=2, family="patch", budget=5.0, detected=True, anomaly_score=1.0)
    assert violations([noticed], [cert_row(0, 5.0, certificate="patch-detection")]) == []
    assert len(violations([noticed], [cert_row(0, 5.0, certificate="patch")])) == 1
    assert len(violations([attacked(2, 5.0)], [cert_row(0, 5.0, certificate="patch-detection")])) == 1


def test_what_was_tried_is_counted_by_kind() -> None:
    rows = [eval_row(i) for i in range(3)] + [attacked(1, 4.0, sample_id=i) for i in range(3)] + [attacked(1, 6.0, sample_id=0)]
    certificates = [cert_row(0, 5.0, certificate="patch"), cert_row(1, 3.0, certificate="patch"), cert_row(2, 5.0, certificate="l0")]
    patch, l0 = cross_check(rows, certificates)
    assert (patch.certificate, patch.samples, patch.checks) == ("patch", 1, 1)
    assert (l0.certificate, l0.samples, l0.checks) == ("l0", 0, 0)


def test_the_results_of_several_kinds_share_a_file_and_a_violation_fails_loudly(tmp_path: Path) -> None:
    conclude(tmp_path, [Checked("l2", 3, 6, ())])
    found = (Violation(7, "patch", 5.0, 1, "attack", 5.0, 2),)
    with pytest.raises(CertificateViolation, match=r"1 certified samples .* \[7\].* sample 7, patch radius 5"):
        conclude(tmp_path, [Checked("patch", 2, 2, found)])
    content = json.loads((tmp_path / RESULT).read_text())
    assert content["violations"] == 1
    assert {kind: result["violations"] for kind, result in content["certificates"].items()} == {"l2": 0, "patch": 1}
    assert conclude(tmp_path, [Checked("patch", 2, 2, ())])["violations"] == 0  # the same kind again replaces its result


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / RESULT).write_text("[]")
    with pytest.raises(InputError, match="not a cross-check result"):
        conclude(tmp_path, [])
    assert (tmp_path / RESULT).read_text() == "[]"
