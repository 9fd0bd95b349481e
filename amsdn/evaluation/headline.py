"""What the headline table of a report is made of: runs, cells, rows, and the names that people give to threats and budgets."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amsdn.evaluation.reliability.finding import MODEL
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

    def attacks_within(self, family: str, budget: float, *, evading: bool = False) -> frozenset[str]:
        """Configuration hashes of the attacks that count at this budget (threat sets are nested).

        Those that also evade a detector are left out unless asked for: they exist only for models that have one, and can only lower its
        numbers.
        """
        return frozenset(
            r.config_hash
            for r in self.records
            if r.family == family and (evading or not r.evades) and (r.budget <= budget or same_budget(r.budget, budget))
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
    published: str = ""  # the best number known for the very same data and threat


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


def certified_at(summary: Mapping[str, Any], certificate: str, radius: float) -> Cell | None:
    """The share answered rightly with a certified radius of at least ``radius``; None where the curve has no such point."""
    curve = summary["certified"].get(certificate, {}).get("curve", ())
    return next((cell_of(p["accuracy"]) for p in curve if math.isclose(p["radius"], radius, rel_tol=1e-6)), None)


def threat_entry(run: Run, family: str, budget: float) -> Mapping[str, Any] | None:
    """The summary's worst case of one threat; None where it was not evaluated."""
    return next((t for t in run.summary["threats"] if t["family"] == family and same_budget(t["budget"], budget)), None)
