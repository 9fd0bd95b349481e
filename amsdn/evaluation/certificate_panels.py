"""The report's parts about certificates: curves with the attacks above them, costs, the cross-check, and what is not promised."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from amsdn.evaluation import figures
from amsdn.evaluation.bars import published
from amsdn.evaluation.figures import Axis, Curve, Point
from amsdn.evaluation.headline import Run, capital, cell_of, certified_at, count, describe_certificate, family_name, percent
from amsdn.evaluation.panels import chart

_FAMILY = {"l0": "sparse"}  # the attacks' name for the threat, where it is not the certificate's
_RADIUS = {
    "l2": "certified ℓ₂ radius",
    "patch": "side of the patch in pixels",
    "patch-detection": "side of the patch in pixels",
    "l0": "pixels changed",
}
_CLASSIFIER = {
    "l2": "the smoothed classifier, which answers by majority over noisy copies",
    "patch": "the model under double masking, which answers from masked views",
    "patch-detection": "the model that answers only if all masked views agree, and raises the alarm otherwise",
    "l0": "the model that answers by votes over disjoint sets of pixels",
}


def certificate_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Certified accuracy against radius, one chart per certificate; dashed, what attacks left of the same certified classifier."""
    charts = []
    for certificate in dict.fromkeys(c for run in runs for c in run.summary["certified"]):
        curves = [c for slot, run in enumerate(runs) for c in _curves(run, certificate, slot)]
        if not curves:
            continue
        highest = max(p.x for c in curves for p in c.points)
        ticks = tuple((t, f"{t:g}") for t in figures.nice_ticks(0.0, highest))
        axis = Axis(_RADIUS.get(certificate, f"certified {family_name(certificate)} radius"), 0.0, highest, ticks)
        charts.append(chart(capital(family_name(certificate)), curves, axis, y_title="certified accuracy, %", x_label=lambda x: f"{x:g}"))
    return charts


def certificate_legend(runs: Sequence[Run]) -> list[tuple[Markup, str]]:
    """The lines of these charts: what is certified of each run, and what attacks left of the same certified classifier."""
    legend = []
    for slot, run in enumerate(runs):
        legend.append((figures.swatch(slot, marker=False), f"{run.name}, certified"))
        if run.defences:
            legend.append((figures.swatch(slot, 1), f"{run.name}, attacked"))
    return legend


def certificate_facts(runs: Sequence[Run]) -> list[str]:
    """What the certificates cost, how often they abstained and what the median image is certified for; one line per run and certificate."""
    facts = []
    for run in runs:
        for certificate, found in run.summary["certified"].items():
            cost = f"{count(found['mean_samples'])} forward passes and {found['mean_seconds']:.2g} s an image"
            abstained = cell_of(found["abstained"])
            word = "alarms without an attack" if certificate == "patch-detection" else "abstentions"
            share = f", {percent(abstained.value)} % {word}" if abstained and abstained.value else ""
            bar = published(f"median:{certificate}", 0, run.info.get("data"))
            median = f", median radius {found['median']:g}{f' ({bar})' if bar else ''}" if found.get("median") is not None else ""
            facts.append(f"{run.name}, {family_name(certificate)}: {found['samples']} images, {cost} on average{share}{median}.")
        facts += [_attack_fact(run, certificate, summary) for certificate, summary in run.defences.items()]
    return facts


def crosscheck_lines(run: Run) -> list[dict[str, str]]:
    """The outcome of the cross-check in words, one line per certificate, with a sign for the eye."""
    if run.crosscheck is None:
        return [{"css": "none", "sign": "–", "text": f"{run.name}: not run."}]
    return [_crosscheck_line(run.name, kind, found) for kind, found in run.crosscheck["certificates"].items()]


def certificate_limits(run: Run) -> list[str]:
    """What the certificates of a run do not say."""
    certificates = run.summary["certified"]
    said = [
        f"The {family_name(kind)} certificate is about {_CLASSIFIER[kind]}; the attack rows are about the model as it is. These are different "
        "classifiers on the same weights."
        for kind in certificates
        if kind in _CLASSIFIER
    ]
    covered = {_FAMILY.get(kind, kind) for kind in certificates}
    if uncovered := [family_name(family) for family in run.summary["headline"] if family not in covered]:
        said.append(f"Nothing is certified against: {', '.join(uncovered)}.")
    return said


def _curves(run: Run, certificate: str, slot: int) -> list[Curve]:
    """The certified curve, and that of the attacks on the same classifier where there is one."""
    certified = run.summary["certified"].get(certificate, {}).get("curve", ())
    points = _steps([Point(p["radius"], c.value, c.low, c.high) for p in certified if (c := cell_of(p["accuracy"]))])
    if not points:
        return []
    curves = [Curve(run.name, points, slot, markers=False)]
    if attacked := run.defences.get(certificate):
        measured = attacked["curves"].get(_FAMILY.get(certificate, certificate), ())
        left = [(0.0, cell_of(attacked["clean"])), *((p["budget"], cell_of(p["robust_accuracy"])) for p in measured)]
        curves.append(Curve(f"{run.name}, attacked", tuple(Point(b, c.value, c.low, c.high) for b, c in left if c), slot, dash=1))
    return curves


def _steps(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points with a drop right after each, for a line that claims nothing between two radii that is not proved at the larger one."""
    drops = [(a, replace(b, x=a.x)) for a, b in pairwise(points)]
    return (*(p for drop in drops for p in drop), *points[-1:])


def _attack_fact(run: Run, certificate: str, summary: Mapping[str, Any]) -> str:
    names = ", ".join(summary["attacks"]) or "no attack"
    compared = []
    for point in summary["curves"].get(_FAMILY.get(certificate, certificate), ()):
        left, proved = cell_of(point["robust_accuracy"]), certified_at(summary, certificate, point["budget"])
        if left:
            claimed = percent(proved.value if proved else 0.0)  # the curve ends just beyond the largest radius
            compared.append(
                f"{describe_certificate(certificate, point['budget'])}, {percent(left.value)} % right and {claimed} % certified"
            )
    there = f" On these: {'; '.join(compared)}." if compared else ""
    return (
        f"{run.name}, {family_name(certificate)}, dashed: what {names} left of the certified classifier, worst case an image, on the "
        f"first {summary['samples']} of the certified images.{there}"
    )


def _crosscheck_line(name: str, kind: str, found: Mapping[str, Any]) -> dict[str, str]:
    images, tries, abstained = (count(found[key]) for key in ("samples", "checks", "abstained"))
    close = f", with {abstained} abstentions" if found["abstained"] else ""
    if not found["checks"]:
        text = f"{name}, {family_name(kind)}: nothing to compare, no attacked image lies inside a certified radius."
        return {"css": "none", "sign": "–", "text": text}
    scope = f"in {tries} attacked images inside the certified radii of {images} images{close}"
    chance = found.get("false_alarm_bound")
    luck = f" Sound code would show one with probability at most {chance:.2g}." if chance else ""
    if found["violations"]:
        verdict = f"{name}, {family_name(kind)}: {found['violations']} violations {scope}.{luck} Do not use the certified rows."
        return {"css": "tick-no", "sign": "✕", "text": verdict}
    return {"css": "tick-yes", "sign": "✓", "text": f"{name}, {family_name(kind)}: no violation {scope}.{luck}"}
