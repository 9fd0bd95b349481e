"""The report's parts about answers beside right and wrong: how sure the model is of them, and how they differ by class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from amsdn.evaluation import figures
from amsdn.evaluation.calibration import BINS
from amsdn.evaluation.figures import Axis, Curve, Point
from amsdn.evaluation.headline import Run, capital, cell_of, describe, percent, strongest_attack
from amsdn.evaluation.pictures import class_name
from amsdn.evaluation.statistics import wilson
from amsdn.evaluation.table import CLEAN

FEW_CLASSES = 12  # that many are shown in one table
EXTREMES = 5  # of more, that many at either end
_AXIS = Axis("confidence of the answer, %", 0.0, 1.0, tuple((t, f"{100 * t:g}") for t in (0.0, 0.25, 0.5, 0.75, 1.0)))


def calibration_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Reliability diagrams: one chart without an attack, one for the strongest attack of each headline threat; one line a run.

    Runs whose rows are older than confidences have no line, and a condition without any line has no chart.
    """
    first = runs[0]
    threats = [(describe(family, budget), strongest_attack(first, family, budget)) for family, budget in first.summary["headline"].items()]
    charts = []
    for title, name in [("No attack", CLEAN), *((capital(threat), name) for threat, name in threats if name)]:
        found = [(slot, run.name, told) for slot, run in enumerate(runs) if (told := run.summary["calibration"].get(name))]
        if found:
            charts.append(_reliability_diagram(title, None if name == CLEAN else name, found))
    return charts


def class_table(run: Run) -> dict[str, Any] | None:
    """Every class under every headline threat, worst first by the mean robust accuracy; None where only one class occurs.

    Of many classes the ends are apart: ``parts`` are (heading, lines), ``rest`` the lines between.
    """
    headline = run.summary["headline"]
    lines = [_class_line(entry, list(headline), run.info) for entry in sorted(run.summary["classes"], key=_standing)]
    if len(lines) < 2:
        return None
    few = len(lines) <= FEW_CLASSES
    ends = [(f"The {EXTREMES} worst", lines[:EXTREMES]), (f"The {EXTREMES} best", lines[-EXTREMES:])]
    return {
        "threats": [capital(describe(family, budget)) for family, budget in headline.items()],
        "parts": [("", lines)] if few else ends,
        "rest": [] if few else lines[EXTREMES:-EXTREMES],
        "number": len(lines),
    }


def _reliability_diagram(title: str, attack: str | None, found: Sequence[tuple[int, str, Mapping[str, Any]]]) -> dict[str, Any]:
    """One chart of the runs ``found`` (slot, name, calibration), its legend, and its bins as a table."""
    curves = [Curve(name, tuple(_bin_point(b) for b in told["bins"]), slot) for slot, name, told in found]
    legend = [
        (
            figures.swatch(slot),
            f"{name}: ECE {percent(told['error'])}\u00a0% [{percent(told['low'])}, {percent(told['high'])}], n {told['n']}",
        )
        for slot, name, told in found
    ]
    description = f"Accuracy against confidence, {title}. " + "; ".join(text for _, text in legend)
    drawing = figures.line_chart(curves, _AXIS, description=description, y_title="right answers, %", diagonal=True)
    by_bin = [{_bin_of(b["confidence"]): b for b in told["bins"]} for _, _, told in found]
    table = [(_bin_name(i), [told.get(i) for told in by_bin]) for i in sorted({i for told in by_bin for i in told})]
    return {
        "title": title,
        "aside": attack,
        "drawing": drawing,
        "legend": legend,
        "names": [name for _, name, _ in found],
        "table": table,
    }


def _bin_point(found: Mapping[str, Any]) -> Point:
    low, high = wilson(round(found["n"] * found["accuracy"]), found["n"])
    return Point(found["confidence"], found["accuracy"], low, high)


def _bin_of(confidence: float) -> int:
    """The number of the bin (a,b] that a confidence, or a mean of some in one bin, lies in."""
    return min(max(math.ceil(confidence * BINS - 1e-9) - 1, 0), BINS - 1)


def _bin_name(i: int) -> str:
    return f"{100 * i / BINS:.0f} to {100 * (i + 1) / BINS:.0f}"


def _standing(entry: Mapping[str, Any]) -> tuple[float, ...]:
    robust = [share["value"] for share in entry["robust"].values()]
    return (sum(robust) / len(robust) if robust else 0.0, entry["clean"]["value"], entry["label"])


def _class_line(entry: Mapping[str, Any], families: Sequence[str], info: Mapping[str, Any]) -> dict[str, Any]:
    classes = (info.get("data") or {}).get("classes") or []
    cells = [cell_of(entry["clean"]), *(cell_of(entry["robust"].get(family)) for family in families)]
    return {"name": class_name(classes, entry["label"]), "n": entry["n"], "cells": cells}
