"""The parts of the report below the headline table, each computed from runs and ready for the template."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from amsdn.evaluation import figures
from amsdn.evaluation.figures import Axis, Curve, Point
from amsdn.evaluation.headline import (
    Row,
    Run,
    capital,
    cell_of,
    count,
    describe,
    family_name,
    family_unit,
    percent,
    same_budget,
    short_budget,
    threat_entry,
)
from amsdn.evaluation.reliability import MODEL


def verdict(runs: Sequence[Run], rows: Sequence[Row]) -> Markup:
    """The report in one sentence: what the subject gets right, and in parentheses what the first comparison does."""
    parts: list[Markup] = []
    for row in rows:
        if row.group != "accuracy" or row.cells[0] is None:
            continue
        other = row.cells[1] if len(runs) > 1 else None
        name = Markup("<b>{}</b>: ").format(runs[1].name) if other and not parts else ""
        aside = Markup(" ({}{}\u00a0%)").format(name, percent(other.value)) if other else ""
        threat = row.label[0].lower() + row.label[1:]
        circumstance = {"clean": "right without an attack", "union": "when the worst of all of them counts"}.get(row.key, f"under {threat}")
        parts.append(Markup("{}\u00a0% {}{}").format(percent(row.cells[0].value), circumstance, aside))
    head, last = parts[:-1], parts[-1]
    listed = Markup(" and ").join([Markup(", ").join(head), last]) if head else last
    return Markup("Of {} images, <b>{}</b> gets {}.").format(runs[0].summary["samples"], runs[0].name, listed)


def strip(row: Row) -> Markup:
    """The row's intervals as one small drawing."""
    text = "; ".join(
        "not measured" if c is None else f"{percent(c.value)} per cent, {percent(c.low)} to {percent(c.high)}" for c in row.cells
    )
    points = [None if c is None else Point(c.value, c.value, c.low, c.high) for c in row.cells]
    return figures.interval_strip(points, description=f"{row.label}: {text}")


def attack_table(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """By threat family, one line per attack in order of budget: every run's accuracy, then the first run's details."""
    families: dict[str, list[dict[str, Any]]] = {}
    for name, attack in runs[0].summary["attacks"].items():
        line = {
            "name": name,
            "budget": attack["budget"],
            "threat": describe(attack["family"], attack["budget"]),
            "cells": [cell_of((r.summary["attacks"].get(name) or {}).get("robust_accuracy")) for r in runs],
            "forwards": attack["mean_forwards"],
            "backwards": attack["mean_backwards"],
            "tpr": cell_of(attack["detection"]["tpr"]) if attack["detection"] else None,
            "evades": attack["evades"],
            "missed": cell_of(attack["wrong_undetected"]),
            "map": _map_cells(attack["localisation"] or {}),
        }
        families.setdefault(attack["family"], []).append(line)
    return [(family, sorted(lines, key=lambda line: line["budget"])) for family, lines in families.items()]


def _map_cells(found: Mapping[str, Any]) -> list[str | None]:
    """Where the anomaly map points, as text: mean AUROC, per cent of maps whose largest value lies on a changed pixel, mean IoU."""
    pointing, overlap = found.get("pointing"), found.get("overlap")
    return [
        f"{found['mean']:.3f}" if found else None,
        percent(pointing["value"]) if pointing else None,
        f"{overlap['value']:.3f}" if overlap else None,
    ]


def budget_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Robust accuracy against the attacker's budget, one chart per threat family; the clean accuracy is budget 0."""
    charts = []
    for family in dict.fromkeys(f for run in runs for f in run.summary["curves"]):
        curves = []
        for slot, run in enumerate(runs):
            measured = [(p["budget"], cell_of(p["robust_accuracy"])) for p in run.summary["curves"].get(family, ())]
            points = [Point(b, c.value, c.low, c.high) for b, c in [(0.0, cell_of(run.summary["clean"])), *measured] if c]
            if measured:
                curves.append(Curve(run.name, tuple(points), slot))
        budgets = sorted({p.x for c in curves for p in c.points})
        axis = Axis(family_unit(family), 0.0, budgets[-1], tuple((b, short_budget(family, b)) for b in budgets))
        charts.append(
            chart(capital(family_name(family)), curves, axis, y_title="robust accuracy, %", x_label=lambda x, f=family: short_budget(f, x))
        )
    return charts


def roc_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The detector's ROC against successful attacks at each headline budget, one chart per threat, one line per attack."""
    axis = Axis("false positive rate, %", 0.0, 1.0, tuple((t, f"{100 * t:g}") for t in (0.0, 0.25, 0.5, 0.75, 1.0)))
    several = sum(any(a["detection"] for a in run.summary["attacks"].values()) for run in runs) > 1
    charts = []
    for family, budget in runs[0].summary["headline"].items():
        curves, legend = [], []
        for slot, run in enumerate(runs):
            for dash, (attack, found) in enumerate(_detections(run, family, budget)):
                name = f"{run.name}, {attack}" if several else attack
                curves.append(Curve(name, tuple(Point(x, y) for x, y in found["roc"]), slot, dash, markers=False))
                area = "AUROC {value:.3f} [{low:.3f}, {high:.3f}]".format(**found["auroc"])
                legend.append((figures.swatch(slot, dash, marker=False), f"{name}: {area}, {found['tpr']['n']} attacks"))
        if curves:
            description = f"ROC of the detector, {describe(family, budget)}. " + "; ".join(text for _, text in legend)
            drawing = figures.line_chart(curves, axis, description=description, y_title="attacks detected, %", diagonal=True, guide=0.05)
            charts.append({"title": capital(describe(family, budget)), "drawing": drawing, "legend": legend})
    return charts


def _detections(run: Run, family: str, budget: float) -> list[tuple[str, dict[str, Any]]]:
    """Detection figures of the attacks at this budget that fooled the model at least once."""
    return [
        (name, attack["detection"])
        for name, attack in run.summary["attacks"].items()
        if attack["family"] == family and same_budget(attack["budget"], budget) and attack["detection"] and attack["detection"]["auroc"]
    ]


def run_legend(runs: Sequence[Run]) -> list[tuple[Markup, str]]:
    """The colour and marker of each run."""
    return [(figures.swatch(slot), run.name) for slot, run in enumerate(runs)]


def limits(runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
    """What the numbers do not show, said from the numbers where possible."""
    first = runs[0]
    unchecked = [run.name for run in runs if run.checks is None]
    widest = max((c.high - c.low for row in rows if row.group == "accuracy" for c in row.cells if c), default=0.0)
    said = [
        f"Robust accuracy is an upper bound: it counts what these attacks could not break with what they spent. {_effort(first)}"
        "A stronger or better tuned attack can only lower it.",
        f"{first.summary['samples']} images were evaluated, and an interval in the accuracy rows is up to {100 * widest:.0f} points wide. "
        "Intervals cover the choice of images, not the luck of training: each column is one trained model.",
    ]
    said += _limits_of_detection(first, rows)
    if first.summary["dropped"]:
        said.append(f"{first.summary['dropped']} images lack rows for some attack and are counted nowhere.")
    if any(d and not d.comparable for row in rows if row.group != "detection" for d in row.differences):
        said.append("Some rows compare runs with other images or other attack settings; no difference is claimed there.")
    if unchecked:
        said.append(f"No checks of reliability were made of {', '.join(unchecked)}: amsdn evaluate --protocol makes them.")
    if len(runs) == 1:
        said.append("There is no comparison model here, so the report does not show what the defence adds.")
    return said


def _limits_of_detection(run: Run, rows: Sequence[Row]) -> list[str]:
    if not any(row.group == "detection" for row in rows):
        return []
    said = ["The rows “Detected” hold for attackers who ignore the detector; expect less against one who attacks both at once."]
    ignored = [family_name(f) for f, b in run.summary["headline"].items() if not (threat_entry(run, f, b) or {}).get("evading")]
    if ignored:
        said.append(f"No attack on these tried to escape the detector: {', '.join(ignored)}.")
    return said


def check_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """By run and family, whether its numbers can be believed, and every check behind that; nothing for runs that were not checked."""
    return [
        {
            "run": run.name,
            "threat": "The model itself" if threat == MODEL else capital(family_name(threat)),
            "reliable": told["reliable"],
            "findings": told["findings"],
        }
        for run in runs
        for threat, told in (run.checks or {}).items()
    ]


def chart(title: str, curves: Sequence[Curve], axis: Axis, *, y_title: str, x_label: Any) -> dict[str, Any]:
    """A line chart with its caption and the table that says the same in numbers."""
    positions = sorted({p.x for c in curves for p in c.points})
    shown = positions if len(positions) <= 8 else [x for x, _ in axis.ticks if any(math.isclose(x, p, abs_tol=1e-9) for p in positions)]
    table = [(x_label(x), [_at(curve, x) for curve in curves]) for x in shown]
    text = "; ".join(
        f"{c.label}: " + ", ".join(f"{percent(p.y)} at {label}" for label, cells in table if (p := cells[i])) for i, c in enumerate(curves)
    )
    drawing = figures.line_chart(curves, axis, description=f"{title}, {y_title} against {axis.title}. {text}", y_title=y_title)
    return {"title": title, "drawing": drawing, "axis": axis.title, "names": [c.label for c in curves], "table": table}


def _at(curve: Curve, x: float) -> Point | None:
    return next((p for p in curve.points if math.isclose(p.x, x, rel_tol=1e-6, abs_tol=1e-9)), None)


def _effort(run: Run) -> str:
    spent = [(a["mean_forwards"] or 0, a["mean_backwards"] or 0) for a in run.summary["attacks"].values()]
    if not spent:
        return ""
    forwards, backwards = (count(max(column)) for column in zip(*spent, strict=True))
    return f"The longest took {forwards} forward passes an image on average, and none more than {backwards} gradients. "
