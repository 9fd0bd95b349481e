"""The complete part of a run's rows, and what the worst attack within a budget does to each sample."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from amsdn.errors import InputError
from amsdn.records import EvalRecord

CLEAN = "clean"


@dataclass(frozen=True)
class Table:
    """The complete part of a set of rows: one row per attack and sample, clean first, samples in the same order everywhere."""

    sample_ids: tuple[int, ...]
    rows: Mapping[str, tuple[EvalRecord, ...]]  # by attack name
    dropped: int  # samples left out because some attack has no row for them

    @property
    def clean(self) -> tuple[EvalRecord, ...]:
        return self.rows[CLEAN]

    @property
    def attacks(self) -> dict[str, tuple[EvalRecord, ...]]:
        """Everything but the clean rows."""
        return {name: rows for name, rows in self.rows.items() if name != CLEAN}

    def budgets(self) -> dict[str, list[float]]:
        """The evaluated budgets of each family, growing."""
        found: dict[str, set[float]] = {}
        for rows in self.attacks.values():
            found.setdefault(rows[0].family, set()).add(rows[0].budget)
        return {family: sorted(budgets) for family, budgets in found.items()}

    def broken(self, family: str, budget: float) -> list[bool]:
        """Per sample: misclassified clean, or fooled by any attack of the family within the budget.

        Threat sets are nested, so an attack with a smaller budget counts, and so does one with a larger budget
        whose image happens to spend no more than this one.
        """
        return self._worst(family, budget, lambda row: not row.correct)

    def unnoticed(self, family: str, budget: float) -> list[bool] | None:
        """As ``broken``, but only misclassified images count that the model's detector lets pass; None without a detector."""
        if any(row.detected is None for rows in self.rows.values() for row in rows):
            return None
        return self._worst(family, budget, lambda row: not row.correct and not row.detected)

    def deceived(self, family: str, budget: float, threshold: float) -> list[bool] | None:
        """As ``broken``, but only misclassified images count whose anomaly score is at most ``threshold``; None without a detector."""
        if any(row.anomaly_score is None for rows in self.rows.values() for row in rows):
            return None
        return self._worst(family, budget, lambda row: not row.correct and not (row.anomaly_score or 0.0) > threshold)

    def _worst(self, family: str, budget: float, bad: Callable[[EvalRecord], bool]) -> list[bool]:
        hit = [bad(row) for row in self.clean]
        limit = budget * (1 + 1e-6)  # a budget typed by hand need not equal the recorded float
        for rows in self.attacks.values():
            if rows[0].family == family:
                hit = [h or (bad(row) and min(row.budget, row.spent) <= limit) for h, row in zip(hit, rows, strict=True)]
        return hit


def complete_table(records: Iterable[EvalRecord]) -> Table:
    """Sort rows by attack, keep the samples that have all of them; raises InputError where rows contradict one another."""
    by_attack: dict[str, dict[int, EvalRecord]] = {}
    for row in records:
        rows = by_attack.setdefault(row.attack, {})
        if row.sample_id in rows:
            raise InputError(f"two rows of attack {row.attack!r} for sample {row.sample_id}; summarise one run at a time")
        first = next(iter(rows.values()), row)
        if (row.config_hash, row.seed, row.family, row.budget) != (first.config_hash, first.seed, first.family, first.budget):
            raise InputError(f"attack {row.attack!r} has rows of two configurations or seeds; summarise one run at a time")
        rows[row.sample_id] = row
    if CLEAN not in by_attack:
        raise InputError("no rows of the unattacked images (attack 'clean'); run amsdn evaluate first")
    everywhere = set.intersection(*(set(rows) for rows in by_attack.values()))
    if not everywhere:
        raise InputError("no sample has rows for every attack yet; let amsdn evaluate finish")
    seen = set.union(*(set(rows) for rows in by_attack.values()))
    ids = tuple(sorted(everywhere))
    for name, rows in by_attack.items():
        if any(rows[i].label != by_attack[CLEAN][i].label for i in ids):
            raise InputError(f"attack {name!r} and the clean rows disagree about labels; they are not of one data set")
    table = {name: tuple(rows[i] for i in ids) for name, rows in sorted(by_attack.items(), key=lambda item: item[0] != CLEAN)}
    return Table(ids, table, len(seen) - len(everywhere))
