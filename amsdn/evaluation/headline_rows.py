"""The rows of the headline table: what is compared with what, and when a difference may be claimed.

The HTML page and the terminal print the same rows, computed once here from the summaries of the runs.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from amsdn.evaluation.bars import published
from amsdn.evaluation.headline import (
    Cell,
    Difference,
    Row,
    Run,
    capital,
    cell_of,
    certified_at,
    count,
    describe,
    describe_certified,
    percent,
    same_budget,
    strongest_attack,
    threat_entry,
)
from amsdn.evaluation.summary import headline_radii


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
                published(f"worst:{family}", budget, first.info.get("data")),
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
            bar = published(f"certified:{certificate}", radius, first.info.get("data"))
            rows.append(_row(runs, f"certified:{certificate}:{radius:g}", label, note, "certified", cells, same, bar=bar))
            shown += 1
    return rows


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
    return rows + _unnoticed_rows(runs) + _rejecting_rows(runs)


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


def _rejecting_rows(runs: Sequence[Run]) -> list[Row]:
    """By threat and rate of false alarms: the images that no attack turns wrong without being rejected."""
    rows: list[Row] = []
    for family, budget in runs[0].summary["headline"].items():
        found = [_rejecting(r, family, budget) for r in runs]
        same = [_same_attacks(runs[0], r, {family: budget}, evading=True) for r in runs[1:]]
        for fpr in found[0]:
            kept = [(r.name, cell_of(f[fpr]["kept"])) for r, f in zip(runs, found, strict=True) if fpr in f]
            shares = ", ".join(f"{name} {percent(c.value)}" if len(kept) > 1 else percent(c.value) for name, c in kept if c)
            note = f"right and kept when clean: {shares}\u00a0%"
            label = f"Right or rejected, {describe(family, budget)}, at {100 * fpr:g}\u00a0% false alarms"
            cells = [cell_of(f[fpr]["safe"]) if fpr in f else None for f in found]
            rows.append(_row(runs, f"rejecting:{family}:{fpr:g}", label, note, "detection", cells, same, (family,)))
    return rows


def _rejecting(run: Run, family: str, budget: float) -> dict[float, Mapping[str, Any]]:
    """What rejecting is worth at this threat, by rate of false alarms; nothing without a detector, or where it was not evaluated."""
    return {entry["fpr"]: entry for entry in (threat_entry(run, family, budget) or {}).get("rejecting") or ()}


def _row(
    runs: Sequence[Run],
    key: str,
    label: str,
    note: str,
    group: str,
    cells: Sequence[Cell | None],
    comparable: Sequence[bool],
    families: Collection[str] = (),
    bar: str = "",
) -> Row:
    """``families``: those whose attacks the numbers rest on."""
    assert len(cells) == len(runs), key
    assert len(comparable) == len(runs) - 1, key
    doubts = tuple(run.doubts(families) for run in runs)
    believed = [same and not doubts[0] and not other for same, other in zip(comparable, doubts[1:], strict=True)]
    differences = tuple(_difference(cells[0], other, same) for other, same in zip(cells[1:], believed, strict=True))
    return Row(key, label, note, group, tuple(cells), differences, doubts, bar)


def _difference(mine: Cell | None, other: Cell | None, comparable: bool) -> Difference | None:
    if mine is None or other is None:
        return None
    return Difference(100 * (mine.value - other.value), mine.low > other.high or mine.high < other.low, comparable)


def _worst_case(run: Run, family: str, budget: float) -> Cell | None:
    for point in run.summary["curves"].get(family, ()):
        if same_budget(point["budget"], budget):
            return cell_of(point["robust_accuracy"])
    return None


def _certified_images(run: Run, certificate: str) -> frozenset[int]:
    return frozenset(c.sample_id for c in run.certificates if c.certificate == certificate)


def _tpr(run: Run, attack: str | None) -> Mapping[str, Any] | None:
    found = run.summary["attacks"].get(attack)
    return found["detection"]["tpr"] if found and found["detection"] else None


def _same_images(a: Run, b: Run) -> bool:
    return a.sample_ids == b.sample_ids


def _same_attacks(a: Run, b: Run, budgets: Mapping[str, float], *, evading: bool = False) -> bool:
    within = [{f: r.attacks_within(f, v, evading=evading) for f, v in budgets.items()} for r in (a, b)]
    return _same_images(a, b) and within[0] == within[1]
