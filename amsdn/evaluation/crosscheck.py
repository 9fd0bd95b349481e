"""Certified implies not broken: the check that every certificate must pass against every attack.

A certificate is about a *certified classifier*. Its own answers on attacked images can contradict it, those of the base classifier
inside it cannot. ``CLAIMS`` says for each kind of certificate what would:

- double masking and pixel votes (patch, l0) are classifiers that attacks are run against like any other; an attack row of the
  same sample contradicts the certificate if its image spends no more than the radius and its prediction is another
  (``cross_check``). A certificate of *detection* allows one more thing: that the alarm is raised.
- the smoothed classifier (l2) has no exact answer to record; ``smoothing_attack`` attacks and asks it.

A contradiction raises ``CertificateViolation`` after the evidence is on disk.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amsdn.errors import InputError
from amsdn.evaluation.certifier import ABSTAIN
from amsdn.evaluation.run_folder import writing_to
from amsdn.records import CertRecord, EvalRecord, write_json

RESULT = "crosscheck.json"
DEFENCE_RUNS: Mapping[str, str] = {"patch": "patch-defence", "l0": "l0-defence"}
"""Where in a run folder the attacks on a certified classifier are recorded, by certificate: in a folder there for each set of them."""


@dataclass(frozen=True)
class Promise:
    """What a kind of certificate is about."""

    family: str  # the threat family whose unit the radius has
    smoothed: bool = False  # a random classifier, whose answers attack rows do not hold
    or_alarm: bool = False  # an attacked image may also be detected instead of answered
    zero_claims: bool = False  # radius 0 still promises the answer on the image itself, whatever images are beside it


CLAIMS: Mapping[str, Promise] = {
    "l2": Promise("l2", smoothed=True),
    "patch": Promise("patch"),
    "patch-detection": Promise("patch", or_alarm=True),
    "l0": Promise("sparse", zero_claims=True),
}


@dataclass(frozen=True)
class Violation:
    """One image inside a certified radius on which the certified classifier answers something else."""

    sample_id: int
    certificate: str
    radius: float
    certified_prediction: int
    attack: str
    spent: float
    prediction: int


@dataclass(frozen=True)
class Checked:
    """What the cross-check of one kind of certificate found."""

    certificate: str
    samples: int  # certificates that some attacked image could have contradicted
    checks: int  # such images
    found: tuple[Violation, ...]
    abstained: int = 0  # of the checks: smoothed answers too close to call
    false_alarm_bound: float = 0.0  # the most that the chance of any violation can be if the code is sound
    rows: tuple[Mapping[str, Any], ...] = ()  # every check that no other file holds
    folder: str = ""  # within the run folder, where the attack rows lie


class CertificateViolation(RuntimeError):
    """An attack changed a certified prediction inside its radius."""

    def __init__(self, violations: Sequence[Violation], chance: float = 0.0) -> None:
        samples = sorted({v.sample_id for v in violations})
        luck = f"; the chance of any such finding with sound code is at most {chance:.2g}" if chance else ""
        first = violations[0]
        super().__init__(
            f"{len(samples)} certified samples changed their answer inside the certified radius: {samples[:20]}{luck}. First: sample "
            f"{first.sample_id}, {first.certificate} radius {first.radius:g}, certified {first.certified_prediction}, but "
            f"{first.attack} spending {first.spent:g} gives {first.prediction}"
        )
        self.violations = tuple(violations)


def claim_of(certificate: CertRecord) -> Promise:
    """What this certificate is about; InputError for an unknown kind."""
    if certificate.certificate not in CLAIMS:
        raise InputError(f"unknown certificate {certificate.certificate!r} in the records; known: {', '.join(CLAIMS)}")
    return CLAIMS[certificate.certificate]


def cross_check(eval_records: Iterable[EvalRecord], cert_records: Iterable[CertRecord]) -> list[Checked]:
    """Compare the rows of the certified classifier under attack with its certificates, one result per kind among ``cert_records``.

    Unattacked rows count as spending 0: the answer on the image itself is part of every claim. Certificates of the smoothed
    classifier and abstentions claim nothing here, nor does a patch certificate of radius 0: where it failed for a near tie, the answer
    may round otherwise in another batch. An image that an attack left as it was, because its answer was wrong before, is no attacked
    image. Raises InputError for a kind of certificate that ``CLAIMS`` does not know.
    """
    rows: dict[int, list[EvalRecord]] = {}
    for row in eval_records:
        rows.setdefault(row.sample_id, []).append(row)
    by_kind: dict[str, list[tuple[CertRecord, EvalRecord]]] = {}
    for certificate in cert_records:
        promise = claim_of(certificate)
        if promise.smoothed:
            continue
        pairs = by_kind.setdefault(certificate.certificate, [])
        if certificate.prediction != ABSTAIN and (certificate.radius > 0 or promise.zero_claims):
            inside = (
                r for r in rows.get(certificate.sample_id, ()) if r.family in (promise.family, "clean") and r.spent <= certificate.radius
            )
            pairs += [(certificate, row) for row in inside]
    return [_checked(kind, pairs) for kind, pairs in by_kind.items()]


def conclude(out: Path, results: Sequence[Checked]) -> dict[str, Any]:
    """Write the results into ``out/crosscheck.json`` beside those of other kinds, and return its content; then raise
    CertificateViolation if any of ``results`` has a violation.

    Keys: ``violations`` (count over all kinds) and ``certificates``: by kind, the fields of ``Checked`` with the count of ``found``
    as ``violations``. Raises InputError where a file there is none of ours.
    """
    path = out / RESULT
    kinds = {**_known(path), **{result.certificate: _plain(result) for result in results}}
    content = {"violations": sum(kind["violations"] for kind in kinds.values()), "certificates": kinds}
    with writing_to(out):
        write_json(path, content)
    if found := [violation for result in results for violation in result.found]:
        raise CertificateViolation(found, max(result.false_alarm_bound for result in results if result.found))
    return content


def _checked(kind: str, pairs: Sequence[tuple[CertRecord, EvalRecord]]) -> Checked:
    alarm = CLAIMS[kind].or_alarm
    found = tuple(
        Violation(row.sample_id, kind, c.radius, c.prediction, row.attack, row.spent, row.prediction)
        for c, row in pairs
        if row.prediction != c.prediction and not (alarm and row.detected)
    )
    attacked = [c.sample_id for c, row in pairs if row.spent > 0]
    return Checked(kind, len(set(attacked)), len(attacked), found)


def _plain(result: Checked) -> dict[str, Any]:
    """The result as JSON holds it."""
    return {**asdict(result), "found": [asdict(v) for v in result.found], "rows": list(result.rows), "violations": len(result.found)}


def _known(path: Path) -> dict[str, Any]:
    """The results by kind that are there already."""
    if not path.exists():
        return {}
    try:
        kinds = json.loads(path.read_bytes())["certificates"]
        return {name: kind | {"violations": int(kind["violations"])} for name, kind in kinds.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise InputError(f"{path}: not a cross-check result ({type(e).__name__}); delete it and run amsdn certify again") from e
