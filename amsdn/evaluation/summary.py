"""From rows to numbers. Pure functions of the records: no model, no data, no randomness.

Two rules make the numbers comparable. Only samples that have a row for every attack are counted, and the number of
others is stated. A sample that is misclassified without an attack counts as broken under every threat.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from amsdn.errors import InputError
from amsdn.evaluation.calibration import Calibration, calibration
from amsdn.evaluation.detection import auroc, roc_points, threshold_at_fpr, tpr_at_fpr
from amsdn.evaluation.statistics import CONFIDENCE, mean_interval, proportion, share
from amsdn.evaluation.table import Table, complete_table
from amsdn.records import CertRecord, EvalRecord

FPR = 0.05
FPRS = (0.01, 0.05)  # at which rejection is judged
RADIUS_STEP = 0.05  # of the certified curve for l2; pixel certificates go by whole pixels


def summarise(
    eval_records: Iterable[EvalRecord],
    cert_records: Iterable[CertRecord] = (),
    *,
    headline: Mapping[str, float] | None = None,
    radii: Mapping[str, Sequence[float]] | None = None,
    confidence: float = CONFIDENCE,
) -> dict[str, Any]:
    """All numbers of a run as one dictionary of plain JSON values (report.json's core).

    A proportion is ``{successes, n, value, low, high, text}`` with a Wilson interval; value, low and high are None for n = 0.

    - samples, dropped, confidence, clean (proportion), false_positives (proportion of clean images flagged, or None);
    - attacks: by name, see ``summarise_attack``;
    - threats: worst case over attacks per image, one entry per family and budget: family, budget, attacks, robust_accuracy,
      unnoticed (proportion of images that some attack, or none at all, turns wrong without being detected; None without a
      detector) and evading (the attacks among them that also tried to stay undetected);
      Also rejecting (see ``_rejecting``): what rejecting suspicious images at given rates of false alarms is worth;
    - calibration: by attack and for ``clean``, see ``calibration``; empty where rows hold no confidence;
    - classes: by label, what is right clean and under each headline threat, and n;
    - curves: by family, the same entries as points of a security curve: budget, robust_accuracy;
    - headline: the budget per family (the largest evaluated, unless one is given that was evaluated) and
      union: robust accuracy when the attacker may choose among all these families, per image (None without any);
    - certified: by certificate, see ``summarise_certificates``.

    ``radii`` gives the radii of the certified curve by certificate; by default a grid. Raises InputError where the rows
    cannot be of one run or no sample is complete.
    """
    table = complete_table(eval_records)
    budgets = table.budgets()
    chosen = headline_budgets(table, headline)

    def robust(broken: Sequence[bool]) -> dict[str, Any]:
        return share([not b for b in broken], confidence).as_dict()

    curves = {f: [{"budget": b, "robust_accuracy": robust(table.broken(f, b))} for b in found] for f, found in budgets.items()}
    by_family = [table.broken(family, budget) for family, budget in chosen.items()]
    return {
        "samples": len(table.sample_ids),
        "dropped": table.dropped,
        "confidence": confidence,
        "clean": share([row.correct for row in table.clean], confidence).as_dict(),
        "false_positives": _flagged(table.clean, confidence),
        "attacks": {name: summarise_attack(rows, table.clean, confidence) for name, rows in table.attacks.items()},
        "threats": [
            {
                "family": f,
                "budget": b,
                "attacks": (names := _attacks_within(table, f, b)),
                "robust_accuracy": robust(table.broken(f, b)),
                "unnoticed": None if (hits := table.unnoticed(f, b)) is None else share(hits, confidence).as_dict(),
                "evading": [name for name in names if table.rows[name][0].evades],
                "rejecting": _rejecting(table, f, b, confidence),
            }
            for f, found in budgets.items()
            for b in found
        ],
        "calibration": {name: asdict(found) for name, rows in table.rows.items() if (found := _calibration(rows, confidence))},
        "classes": _by_class(table, chosen, confidence),
        "curves": curves,
        "headline": chosen,
        "union": robust([any(hits) for hits in zip(*by_family, strict=True)]) if by_family else None,
        "certified": summarise_certificates(cert_records, radii or {}, confidence),
    }


def headline_budgets(table: Table, asked: Mapping[str, float] | None) -> dict[str, float]:
    """By family the budget worth a headline: the asked one where it was evaluated, else the largest; every family if none is asked for."""
    budgets = table.budgets()
    largest = {family: found[-1] for family, found in budgets.items()}
    known = {f: b for f, b in (asked or largest).items() if f in budgets} or largest
    return {f: float(b) if _evaluated(b, budgets[f]) else largest[f] for f, b in known.items()}


def summarise_attack(rows: Sequence[EvalRecord], clean: Sequence[EvalRecord], confidence: float = CONFIDENCE) -> dict[str, Any]:
    """One attack's numbers; ``rows`` and ``clean`` are of the same samples in the same order.

    family, budget, evades, robust_accuracy (proportion), successes (clean-correct, then fooled), mean_forwards and mean_backwards
    (passes per sample that was attacked at all, that is clean-correct), detection (see ``summarise_detection``),
    wrong_undetected (proportion of all samples that are misclassified under attack and pass the model's own detector) and
    localisation (over successful attacks: mean of the anomaly map's AUROC, n, pointing and overlap, see EvalRecord, as value, low and high);
    the last three are None where undefined.
    """
    attempted = [row for row, before in zip(rows, clean, strict=True) if before.correct]
    successes = [row for row in attempted if not row.correct]
    located = [row.localisation for row in successes if row.localisation is not None]
    return {
        "family": rows[0].family,
        "budget": rows[0].budget,
        "evades": rows[0].evades,
        "robust_accuracy": proportion(len(attempted) - len(successes), len(rows), confidence).as_dict(),
        "successes": len(successes),
        "mean_forwards": _mean([row.forwards for row in attempted]),
        "mean_backwards": _mean([row.backwards for row in attempted]),
        "detection": summarise_detection(rows, clean, confidence),
        "wrong_undetected": _wrong_undetected(rows, confidence),
        "localisation": {"mean": _mean(located), "n": len(located), **_pointing(successes, confidence)} if located else None,
    }


def summarise_detection(rows: Sequence[EvalRecord], clean: Sequence[EvalRecord], confidence: float = CONFIDENCE) -> dict[str, Any] | None:
    """How the detector fared against one attack; None where the model has no detector.

    Attacks that failed need no detection, so these figures are about *successful* ones: clean-correct, then fooled.

    - auroc: value, low, high (Hanley-McNeil, see ``detection.auroc``) against the clean scores of the same samples, and roc: its
      (false-positive rate, true-positive rate) points; None and empty without successful attacks;
    - tpr: proportion flagged at the threshold that flags at most 5 % (``fpr``) of ALL clean images, and that threshold;
    - flagged: proportion flagged by the model's own decision;
    """
    if any(row.anomaly_score is None for row in (*rows, *clean)):
        return None
    fooled = [i for i, (row, before) in enumerate(zip(rows, clean, strict=True)) if before.correct and not row.correct]
    attacked = _scores([rows[i] for i in fooled])
    same = _scores([clean[i] for i in fooled])
    area = auroc(same, attacked, confidence)
    at_fpr = tpr_at_fpr(_scores(clean), attacked, FPR, confidence)
    assert at_fpr is not None  # a table has at least one clean row
    return {
        "auroc": asdict(area) if area else None,
        "auroc_interval": "Hanley-McNeil variance, score test inverted (Newcombe 2006, method 5)",
        "roc": [list(point) for point in roc_points(same, attacked)],
        "fpr": FPR,
        "threshold": at_fpr[1],
        "tpr": at_fpr[0].as_dict(),
        "flagged": _flagged([rows[i] for i in fooled], confidence),
    }


def summarise_certificates(
    records: Iterable[CertRecord], radii: Mapping[str, Sequence[float]], confidence: float = CONFIDENCE
) -> dict[str, dict[str, Any]]:
    """By certificate: samples, accuracy (right and not abstained), abstained (both proportions), largest (radius), median (radius, an
    image that is wrong counting as below 0: None), curve (radius, accuracy), mean_samples (forward passes a certificate), mean_seconds
    and seconds (wall time of all)."""
    by_kind: dict[str, list[CertRecord]] = {}
    for row in records:
        by_kind.setdefault(row.certificate, []).append(row)
    return {kind: _certificate(kind, rows, radii.get(kind), confidence) for kind, rows in by_kind.items()}


def certified_curve(records: Sequence[CertRecord], radii: Iterable[float], confidence: float = CONFIDENCE) -> list[dict[str, Any]]:
    """Certified accuracy at each radius: the share answered rightly with a certified radius of at least that (Cohen 2019, section 4)."""
    return [{"radius": r, "accuracy": share([c.correct and c.radius >= r for c in records], confidence).as_dict()} for r in radii]


def _certificate(kind: str, rows: Sequence[CertRecord], radii: Sequence[float] | None, confidence: float) -> dict[str, Any]:
    if len({row.sample_id for row in rows}) != len(rows) or len({(row.config_hash, row.seed) for row in rows}) != 1:
        raise InputError(f"the {kind!r} certificates are of several configurations or repeat samples; summarise one run at a time")
    grid = default_radii(kind, max(row.radius for row in rows)) if radii is None else list(radii)
    return {
        "samples": len(rows),
        "accuracy": share([row.correct for row in rows], confidence).as_dict(),
        "abstained": share([row.prediction == -1 for row in rows], confidence).as_dict(),
        "largest": max(row.radius for row in rows),
        "median": _median_radius(rows),
        "curve": certified_curve(rows, grid, confidence),
        "mean_samples": _mean([row.samples for row in rows]),
        "mean_seconds": _mean([row.seconds for row in rows]),
        "seconds": math.fsum(row.seconds for row in rows),
    }


def _median_radius(rows: Sequence[CertRecord]) -> float | None:
    """The radius that at least half of all images reach with the right answer; None where fewer than half are right."""
    radii = sorted((row.radius for row in rows if row.correct), reverse=True)
    half = -(-len(rows) // 2)
    return radii[half - 1] if len(radii) >= half else None


def default_radii(kind: str, largest: float) -> list[float]:
    """Radii from 0 to just beyond the largest certified one (l2: at least to 1), so that a curve ends at zero."""
    if kind == "l2":
        return [round(RADIUS_STEP * i, 10) for i in range(math.floor(max(largest, 1.0) / RADIUS_STEP + 1e-9) + 2)]
    return [float(i) for i in range(math.floor(largest) + 2)]


def headline_radii(kind: str, largest: float) -> list[float]:
    """The radii worth a line of a table, given the largest certified one; at least one, so that having proved nothing shows too."""
    if kind == "l2":
        return [r for r in (0.25, 0.5, 0.75, 1.0) if r <= max(largest, 0.25)]
    if kind == "l0":
        return [float(r) for r in (1, 2, 4, 8, 12, 16, 24, 32) if r <= max(largest, 1)]
    return [max(largest, 1.0)]


def _evaluated(budget: float, budgets: Iterable[float]) -> bool:
    return any(math.isclose(budget, b, rel_tol=1e-6) for b in budgets)


def _attacks_within(table: Table, family: str, budget: float) -> list[str]:
    return [name for name, rows in table.attacks.items() if rows[0].family == family and rows[0].budget <= budget]


def _flagged(rows: Sequence[EvalRecord], confidence: float) -> dict[str, Any] | None:
    if any(row.detected is None for row in rows):
        return None
    return share([bool(row.detected) for row in rows], confidence).as_dict()


def _wrong_undetected(rows: Sequence[EvalRecord], confidence: float) -> dict[str, Any] | None:
    if any(row.detected is None for row in rows):
        return None
    return share([not row.correct and not row.detected for row in rows], confidence).as_dict()


def _scores(rows: Sequence[EvalRecord]) -> list[float]:
    return [row.anomaly_score for row in rows if row.anomaly_score is not None]


def _pointing(rows: Sequence[EvalRecord], confidence: float) -> dict[str, Any]:
    """Means of the pointing game and of the overlap, each with a normal interval; None where rows are older than these fields."""
    found = {}
    for name in ("pointing", "overlap"):
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        found[name] = mean_interval(values, confidence).as_dict() if values else None
    return found


def _rejecting(table: Table, family: str, budget: float, confidence: float) -> list[dict[str, Any]] | None:
    """For each of FPRS, the threshold that rejects at most that share of the clean images, and with it: kept (clean images right and not
    rejected) and safe (images that no attack turns wrong without being rejected; those wrong and accepted clean are not). None without a detector.

    Attacks that evade aim just below the detector's own alarm, and would have aimed lower at a lower threshold. So none is judged at a lower one than theirs:
    that would count as rejected what merely was not aimed at it.
    """
    scores = _scores(table.clean)
    own = max(
        (row.anomaly_score for rows in table.rows.values() for row in rows if row.anomaly_score is not None and not row.detected),
        default=0.0,
    )
    if len(scores) < len(table.clean):
        return None
    found = []
    for fpr in FPRS:
        threshold = max(threshold_at_fpr(scores, fpr), own)
        deceived = table.deceived(family, budget, threshold)
        if deceived is None:
            return None
        kept = [row.correct and score <= threshold for row, score in zip(table.clean, scores, strict=True)]
        safe = share([not hit for hit in deceived], confidence).as_dict()
        found.append({"fpr": fpr, "threshold": threshold, "kept": share(kept, confidence).as_dict(), "safe": safe})
    return found


def _calibration(rows: Sequence[EvalRecord], confidence: float) -> Calibration | None:
    sure = [row.confidence for row in rows if row.confidence is not None]
    return calibration(sure, [row.correct for row in rows], confidence) if len(sure) == len(rows) else None


def _by_class(table: Table, headline: Mapping[str, float], confidence: float) -> list[dict[str, Any]]:
    """One entry a label that occurs: label, n, clean, and robust by family at the headline budget."""
    broken = {family: table.broken(family, budget) for family, budget in headline.items()}
    found = []
    for label in sorted({row.label for row in table.clean}):
        at = [i for i, row in enumerate(table.clean) if row.label == label]
        robust = {family: share([not hits[i] for i in at], confidence).as_dict() for family, hits in broken.items()}
        clean = share([table.clean[i].correct for i in at], confidence).as_dict()
        found.append({"label": label, "n": len(at), "clean": clean, "robust": robust})
    return found


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
