"""The headline table of a report: what is compared with what, and when a difference may be claimed.

The HTML page and the terminal print the same rows, computed once here from the summaries of the runs.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amsdn.evaluation.reliability.finding import MODEL
from amsdn.evaluation.summary import headline_radii
from amsdn.evaluation.table import complete_table
from amsdn.records import CertRecord, EvalRecord

GROUPS = {"accuracy": "Right answers", "certified": "Right answers with a certificate", "detection": "Alarms"}
_UNITS = {
    "linf": "largest change of a channel",
    "l2": "Euclidean length of the change",
    "sparse": "pixels changed",
    "patch": "side of the square in pixels",
}
_NAMES = {"linf": "ℓ∞", "l2": "ℓ₂", "l0": "ℓ₀", "sparse": "changed pixels", "patch": "patch", "patch-detection": "patch, or alarm"}


@dataclass(frozen=True)
class Run:
    """One evaluated model: what its run folder holds and the summary of it."""

    name: str
    info: Mapping[str, Any]  # run.json
    records: Sequence[EvalRecord]
    certificates: Sequence[CertRecord]
    summary: Mapping[str, Any]
    crosscheck: Any | None
    defences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by certificate: summary of the attacks on what it certifies
    checks: Mapping[str, Mapping[str, Any]] | None = None  # reliability.json by family, and "model"; None where nothing was checked

    @property
    def sample_ids(self) -> frozenset[int]:
        """The samples that count: those with a row for every attack."""
        return frozenset(complete_table(self.records).sample_ids)

    def doubts(self, families: Collection[str]) -> tuple[str, ...]:
        """Why numbers about attacks of these families cannot be believed; nothing where the checks found nothing, or none were made."""
        about = [MODEL, *families] if families else []
        findings = [f for family in about if self.checks and family in self.checks for f in self.checks[family]["findings"]]
        return tuple(f["told"] for f in findings if not f["passed"])

    def attacks_within(self, family: str, budget: float) -> frozenset[str]:
        """Configuration hashes of the attacks that count at this budget (threat sets are nested).

        Those that also evade a detector are left out: they exist only for models that have one, and can only lower its numbers.
        """
        return frozenset(
            r.config_hash
            for r in self.records
            if r.family == family and not r.evades and (r.budget <= budget or same_budget(r.budget, budget))
        )


@dataclass(frozen=True)
class Cell:
    """A share in [0,1] with its 95 % interval and the number of images behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """How the first run compares with another in one row."""

    points: float  # first run minus the other, in percentage points
    beyond: bool  # the two intervals do not meet
    comparable: bool  # same images, and the same attack configurations within the budget


@dataclass(frozen=True)
class Row:
    """One line of the table: a cell per run (None: not measured) and a difference per comparison."""

    key: str
    label: str
    note: str
    group: str  # "accuracy", "certified" or "detection"
    cells: tuple[Cell | None, ...]
    differences: tuple[Difference | None, ...]
    doubts: tuple[tuple[str, ...], ...]  # per run: why its number cannot be believed


def describe(family: str, budget: float) -> str:
    """A threat as people write it: ``patch 5×5``, ``5 changed pixels``, ``ℓ∞ 8/255``."""
    if family == "patch":
        return f"patch {budget:g}×{budget:g}"
    if family == "sparse":
        return f"{budget:g} changed pixel{'' if budget == 1 else 's'}"
    return f"{_NAMES.get(family, family)} {short_budget(family, budget)}"


def describe_certificate(kind: str, radius: float) -> str:
    """What is certified as people write it: ``ℓ₂ ≤ 0.25``, ``patch 5×5``, ``patch 5×5 or alarm``, ``4 changed pixels``."""
    if kind == "l2":
        return f"{_NAMES[kind]} ≤\u00a0{radius:g}"
    if kind == "patch-detection":
        return f"{describe('patch', radius)} or alarm"
    return describe({"l0": "sparse"}.get(kind, kind), radius)


def describe_certified(kind: str, radius: float, largest: float) -> str:
    """As ``describe_certificate``, but where nothing is certified, so that no row tells what size of patch was asked for, it names none."""
    nothing = {"patch": "patch of any size", "patch-detection": "patch of any size or alarm"}
    return describe_certificate(kind, radius) if largest or kind not in nothing else nothing[kind]


def short_budget(family: str, budget: float) -> str:
    """The budget alone; norms of small pixel changes in the customary 255ths where that is a whole number."""
    over = budget * 255
    if family in ("linf", "l2") and 0 < budget < 0.5 and abs(over - round(over)) < 1e-4:
        return f"{round(over)}/255"
    return f"{budget:g}"


def family_name(family: str) -> str:
    """The family as a heading."""
    return _NAMES.get(family, family)


def family_unit(family: str) -> str:
    """What a budget of this family counts."""
    return _UNITS.get(family, "budget")


def same_budget(a: float, b: float) -> bool:
    """Whether two recorded budgets are the same number, however it was typed."""
    return math.isclose(a, b, rel_tol=1e-6)


def cell_of(proportion: Mapping[str, Any] | None) -> Cell | None:
    """A summary's proportion as a cell; None where nothing was counted."""
    if proportion is None or not proportion["n"]:
        return None
    return Cell(float(proportion["value"]), float(proportion["low"]), float(proportion["high"]), int(proportion["n"]))


def headline_rows(runs: Sequence[Run]) -> list[Row]:
    """Every row of the headline table; the first run is the subject, the others are comparisons.

    The budgets are the first run's headline budgets; a run that was not evaluated there has an empty cell.
    """
    first = runs[0]
    rows = [
        _row(
            runs,
            "clean",
            "Clean accuracy",
            "no attack",
            "accuracy",
            [cell_of(r.summary["clean"]) for r in runs],
            [_same_images(first, r) for r in runs[1:]],
        )
    ]
    headline: Mapping[str, float] = first.summary["headline"]
    for family, budget in headline.items():
        number = len(first.attacks_within(family, budget))
        note = f"worst of {number} attack{'' if number == 1 else 's'}"
        cells = [_worst_case(r, family, budget) for r in runs]
        rows.append(
            _row(
                runs,
                f"worst:{family}",
                capital(describe(family, budget)),
                note,
                "accuracy",
                cells,
                [_same_attacks(first, r, {family: budget}) for r in runs[1:]],
                (family,),
            )
        )
    if len(headline) > 1:
        cells = [cell_of(r.summary["union"]) if dict(r.summary["headline"]) == dict(headline) else None for r in runs]
        rows.append(
            _row(
                runs,
                "union",
                "All of these threats",
                "worst of all attacks on each image",
                "accuracy",
                cells,
                [_same_attacks(first, r, headline) for r in runs[1:]],
                tuple(headline),
            )
        )
    return rows + _certified_rows(runs) + _detection_rows(runs)


def strongest_attack(run: Run, family: str, budget: float) -> str | None:
    """The attack of this family and budget, on the prediction alone, that left the fewest images right; None if there is none."""
    found = [
        (a["robust_accuracy"]["value"], name)
        for name, a in run.summary["attacks"].items()
        if a["family"] == family and same_budget(a["budget"], budget) and not a["evades"]
    ]
    return min(found)[1] if found else None


def capital(text: str) -> str:
    """The text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def count(number: float) -> str:
    """A number in whole units with thin spaces between thousands."""
    return f"{number:,.0f}".replace(",", "\u202f")


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def _row(
    runs: Sequence[Run],
    key: str,
    label: str,
    note: str,
    group: str,
    cells: Sequence[Cell | None],
    comparable: Sequence[bool],
    families: Collection[str] = (),
) -> Row:
    """``families``: those whose attacks the numbers rest on."""
    assert len(cells) == len(runs), key
    assert len(comparable) == len(runs) - 1, key
    doubts = tuple(run.doubts(families) for run in runs)
    believed = [same and not doubts[0] and not other for same, other in zip(comparable, doubts[1:], strict=True)]
    differences = tuple(_difference(cells[0], other, same) for other, same in zip(cells[1:], believed, strict=True))
    return Row(key, label, note, group, tuple(cells), differences, doubts)


def _difference(mine: Cell | None, other: Cell | None, comparable: bool) -> Difference | None:
    if mine is None or other is None:
        return None
    return Difference(100 * (mine.value - other.value), mine.low > other.high or mine.high < other.low, comparable)


def _worst_case(run: Run, family: str, budget: float) -> Cell | None:
    for point in run.summary["curves"].get(family, ()):
        if same_budget(point["budget"], budget):
            return cell_of(point["robust_accuracy"])
    return None


def _certified_rows(runs: Sequence[Run]) -> list[Row]:
    rows: list[Row] = []
    first = runs[0]
    for certificate, found in first.summary["certified"].items():
        same = [_certified_images(first, certificate) == _certified_images(r, certificate) for r in runs[1:]]
        shown = 0
        for radius in headline_radii(certificate, found["largest"]):
            cells = [certified_at(r.summary, certificate, radius) for r in runs]
            if cells[0] is None or (shown and not any(c.value for c in cells if c)):
                continue  # beyond every certificate
            note = f"{count(found['mean_samples'])} passes an image"
            label = f"Certified {describe_certified(certificate, radius, found['largest'])}"
            rows.append(_row(runs, f"certified:{certificate}:{radius:g}", label, note, "certified", cells, same))
            shown += 1
    return rows


def certified_at(summary: Mapping[str, Any], certificate: str, radius: float) -> Cell | None:
    """The share answered rightly with a certified radius of at least ``radius``; None where the curve has no such point."""
    curve = summary["certified"].get(certificate, {}).get("curve", ())
    return next((cell_of(p["accuracy"]) for p in curve if math.isclose(p["radius"], radius, rel_tol=1e-6)), None)


def _certified_images(run: Run, certificate: str) -> frozenset[int]:
    return frozenset(c.sample_id for c in run.certificates if c.certificate == certificate)


def _detection_rows(runs: Sequence[Run]) -> list[Row]:
    rows: list[Row] = []
    alarms = [cell_of(r.summary["false_positives"]) for r in runs]
    if alarms[0] is not None:
        note = "clean images, at the model’s own threshold"
        rows.append(_row(runs, "alarms", "False alarms", note, "detection", alarms, [_same_images(runs[0], r) for r in runs[1:]]))
    for family, budget in runs[0].summary["headline"].items():
        name = strongest_attack(runs[0], family, budget)
        cells = [cell_of(_tpr(r, name)) for r in runs]
        if name is None or cells[0] is None:
            continue
        # Each run counts its own successful attacks, so the images differ by design: no difference is claimed.
        note = f"after {name}, at 5\u00a0% false positives"
        label = f"Detected, {describe(family, budget)}"
        rows.append(_row(runs, f"detection:{family}", label, note, "detection", cells, [False] * (len(runs) - 1), (family,)))
    return rows + _unnoticed_rows(runs)


def _unnoticed_rows(runs: Sequence[Run]) -> list[Row]:
    """For families whose attacks also evade the detector: how often one ends wrong and undetected."""
    rows: list[Row] = []
    for family, budget in runs[0].summary["headline"].items():
        found = threat_entry(runs[0], family, budget)
        if found is None or not found["evading"] or not found["unnoticed"]:
            continue
        cells = [cell_of((threat_entry(r, family, budget) or {}).get("unnoticed")) for r in runs]
        note = f"worst of {len(found['attacks'])} attacks, {len(found['evading'])} of them against the detector too"
        label = f"Wrong and unnoticed, {describe(family, budget)}"
        rows.append(_row(runs, f"unnoticed:{family}", label, note, "detection", cells, [False] * (len(runs) - 1), (family,)))
    return rows


def threat_entry(run: Run, family: str, budget: float) -> Mapping[str, Any] | None:
    """The summary's worst case of one threat; None where it was not evaluated."""
    return next((t for t in run.summary["threats"] if t["family"] == family and same_budget(t["budget"], budget)), None)


def _tpr(run: Run, attack: str | None) -> Mapping[str, Any] | None:
    found = run.summary["attacks"].get(attack)
    return found["detection"]["tpr"] if found and found["detection"] else None


def _same_images(a: Run, b: Run) -> bool:
    return a.sample_ids == b.sample_ids


def _same_attacks(a: Run, b: Run, budgets: Mapping[str, float]) -> bool:
    return _same_images(a, b) and all(a.attacks_within(f, v) == b.attacks_within(f, v) for f, v in budgets.items())
