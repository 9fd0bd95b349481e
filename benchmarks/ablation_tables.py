"""What the ablations say, as Markdown: every arm's accuracies pooled over seeds, and what each part is worth, seed by seed.

Intervals of accuracies are Wilson's over all seeds' images: what another choice of images could change. Those of differences are
Student's over seeds, paired: what another training run could change. With three seeds these are wide, and meant to be.
"""

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from amsdn.evaluation.statistics import wilson

Row = dict[str, Any]
Count = tuple[int, int]


def _count(found: dict[str, Any], field: str = "correct") -> Count:
    return found[field], found["samples"]


def _noticed(row: Row) -> Count:
    """Right, or an alarm, under the patch attack that hurts more: the one that avoids the detector, where there is a detector."""
    found = row["found"]
    attacks = [found[name] for name in ("under patch", "under patch-evading") if name in found]
    return min((_count(a, "correct_or_noticed") for a in attacks), key=lambda c: c[0] / c[1])


MEASURES: dict[str, Callable[[Row], Count]] = {
    "clean": lambda row: _count(row["found"]["clean"]),
    "patch": lambda row: _count(row["found"]["under patch"]),
    "pixels": lambda row: _count(row["found"]["under pixels"]),
    "patch, right or noticed": _noticed,
    "certified patch": lambda row: _count(row["found"]["certified"]),
}


def accuracy(rows: list[Row], measure: Callable[[Row], Count]) -> str:
    """Per cent with Wilson's interval, pooled over the rows' seeds."""
    right, samples = (sum(counts) for counts in zip(*(measure(row) for row in rows), strict=True))
    low, high = wilson(right, samples)
    return f"{100 * right / samples:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def difference(rows: list[Row], others: list[Row], measure: Callable[[Row], Count]) -> str:
    """Points by which ``rows`` exceed ``others``, paired by seed, with Student's 95 % interval over seeds; one seed has none."""
    shares = [{row["seed"]: right / samples for row in arm for right, samples in (measure(row),)} for arm in (rows, others)]
    seeds = sorted(shares[0].keys() & shares[1].keys())
    points = [100 * (shares[0][seed] - shares[1][seed]) for seed in seeds]
    if len(points) < 2:
        return f"{fmean(points):+.1f}" if points else "-"
    half = float(student.ppf(0.975, len(points) - 1)) * stdev(points) / len(points) ** 0.5
    return f"{fmean(points):+.1f} ± {half:.1f}"


def arms_table(found: dict[str, Any]) -> str:
    """One line an arm: what its step costs beside that of all parts, and how accurate it is."""
    arms = _by_arm(found)
    lines = ["| arm | cost of a step | seeds | " + " | ".join(MEASURES) + " |", "|" + "---|" * (3 + len(MEASURES))]
    whole = found["costs"]["all parts"]["train"]
    for name, rows in arms.items():
        cells = " | ".join(accuracy(rows, measure) for measure in MEASURES.values())
        lines.append(f"| {name} | {found['costs'][name]['train'] / whole:.2f} | {len(rows)} | {cells} |")
    return "\n".join(lines)


def parts_table(found: dict[str, Any], pairs: dict[str, tuple[str, str]]) -> str:
    """One line a part: the points by which the arm with it exceeds the arm without it, at equal cost."""
    arms = _by_arm(found)
    lines = ["| part | with | without | " + " | ".join(MEASURES) + " |", "|" + "---|" * (3 + len(MEASURES))]
    for part, (having, lacking) in pairs.items():
        if having in arms and lacking in arms:
            cells = " | ".join(difference(arms[having], arms[lacking], measure) for measure in MEASURES.values())
            lines.append(f"| {part} | {having} | {lacking} | {cells} |")
    return "\n".join(lines)


def consistency_table(found: dict[str, Any]) -> str:
    """The same weights with and without occluded views, on the same images; empty where that has not been measured."""
    lines = ["| weights | views | clean | false alarms | right, worst case | right or noticed, worst case | seeds |", "|" + "---|" * 7]
    for name, rows in _by_arm(found).items():
        measured = [row["consistency"] for row in rows if "consistency" in row]
        for label, key in (("none", "bare"), (f"{measured[0]['views']}", "occluded")) if measured else ():
            seen = [{"found": m[key]} for m in measured]
            cells = " | ".join(accuracy(seen, cell) for cell in CONSISTENCY)
            lines.append(f"| {name} | {label} | {cells} | {len(seen)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


CONSISTENCY: tuple[Callable[[Row], Count], ...] = (
    lambda row: _count(row["found"]["clean"]),
    lambda row: (row["found"]["alarms"], row["found"]["clean"]["samples"]),
    lambda row: _count(row["found"]),
    lambda row: _count(row["found"], "correct_or_noticed"),
)


def _by_arm(found: dict[str, Any]) -> dict[str, list[Row]]:
    order = list(found["costs"])
    arms: dict[str, list[Row]] = {}
    for row in sorted(found["rows"], key=lambda r: (order.index(r["arm"]), r["seed"])):
        arms.setdefault(row["arm"], []).append(row)
    return arms


PAIRS = {
    "purification": ("all parts", "no purification"),
    "purification, without the others": ("purification alone", "plain"),
    "attacks that avoid the detector, in training": ("all parts", "not evading"),
    "attention with bounded evidence": ("all parts", "no attention"),
    "bounded evidence": ("all parts", "unbounded"),
    "FPN": ("all parts", "no FPN"),
    "SSRT as a term of training: the pull to an averaged teacher": ("all parts", "no pull"),
    "SSRT as a stage of its own": ("SSRT first", "all parts"),
    "SSRT as a stage of its own, 2,000 labels": ("few labels, SSRT first", "few labels"),
    "all of them": ("all parts", "plain"),
    "all of them, plain as wide as it costs": ("all parts", "plain, wider"),
}


def consistency_parts(found: dict[str, Any]) -> list[str]:
    """The table of consistency with its heading and source, if it has been measured."""
    table = consistency_table(found)
    if not table:
        return []
    measured = [row["consistency"] for row in found["rows"] if "consistency" in row]
    commits, images = ", ".join(sorted({m["commit"] for m in measured})), measured[0]["bare"]["samples"]
    return [
        "**Consistency**, light mode: the same weights with and without occluded views, per cent.",
        table,
        f"Worst case: over the attacks of `benchmarks/ablation_consistency.py`, commit {commits}, on the first {images} validation images a seed.",
    ]


def page(found: dict[str, Any]) -> str:
    """All three tables with where they come from."""
    settings, commits = found["settings"], sorted({row["commit"] for row in found["rows"]})
    machines = ", ".join(sorted({row["hardware"] for row in found["rows"]}))
    images = f"{settings['samples']} validation images under attack, {found['rows'][0]['found']['clean']['samples']:,} clean"
    source = f"`benchmarks/ablations.py` at commit {', '.join(commits)}; {machines}; {settings['steps']} training steps of all parts as the budget; {images}."
    parts = [
        "**What each part is worth**, in points, at equal cost.",
        parts_table(found, PAIRS),
        "**Every arm**, per cent.",
        arms_table(found),
        *consistency_parts(found),
        source,
    ]
    return "\n\n".join(part for part in parts if part)
