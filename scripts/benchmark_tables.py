#!/usr/bin/env python
"""Keep the measured tables of docs/ true to results/benchmarks/.

    python scripts/benchmark_tables.py write   redraw them
    python scripts/benchmark_tables.py check   exit 1 if they differ from what `write` would make

A table stands between ``<!-- NAME: drawn by scripts/benchmark_tables.py -->`` and ``<!-- /NAME -->``. No number is typed by hand.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "results" / "benchmarks"
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import ablation_tables  # noqa: E402
from evaluation_tables import evaluation_table  # noqa: E402
from scale_tables import scale_table  # noqa: E402
from training_tables import training_table  # noqa: E402


def budgets_table(found: dict[str, Any]) -> str:
    """Quick against full cascades, one line per model and threat."""
    lines = [
        "| model | threat | quick, % standing | full, % standing | broken by full alone | passes an image, quick | full |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, report in found.items():
        for threat, f in report["threats"].items():
            quick, full = ("{} + {}".format(*f[key]) for key in ("quick_passes", "full_passes"))
            lines.append(f"| {name} | {threat} | {f['quick']['text']} | {f['full']['text']} | {f['text']} | {quick} | {full} |")
        notes.append(
            f"- {name}: `{report['command']}` at commit {report['commit']}, {report['date']}, {report['hardware']}; "
            f"{report['samples']} test images, clean {report['clean']['text']}"
        )
    return "\n".join([*lines, "", "Passes are mean forwards + backwards, images that were wrong before the attack included.", "", *notes])


def l0_choice_table(found: dict[str, Any]) -> str:
    """Pixel votes beside randomized ablation, one line per method."""
    radii = [key for key in found["rows"][0] if key.startswith("r=")]
    columns = " | ".join(f"{key.removeprefix('r=')} px" for key in radii)
    lines = [
        f"| method | passes | clean, % | {columns} | median radius |",
        "|" + "---|" * (4 + len(radii)),
    ]
    for row in found["rows"]:
        shares = " | ".join(f"{100 * row[key]:.1f}" for key in ("clean", *radii))
        median = row["median"] if row["median"] is not None and row["median"] >= 0 else "none"
        lines.append(f"| {row['method']} | {row['passes']} | {shares} | {median} |")
    source = f"`{found['command']}` at commit {found['commit']}, {found['date']}, {found['hardware']}; {found['settings']['samples']} test images."
    text = "Certified accuracy in per cent; a difference of 5 points is about what chance alone makes."
    note = f" Note: {found['note']}." if "note" in found else ""
    return "\n".join([*lines, "", f"{text} {source}{note}"])


def certified_table(found: dict[str, Any]) -> str:
    """What one set of weights is certified for, one line per claim."""
    lines = [
        "| against | certified classifier | right and certified, % | right, % | passes an image | images |",
        "|---|---|---|---|---|---|",
    ]
    for row in found.get("l2", []):
        for radius, proved in row["certified"].items():
            if row["procedure"] in (f"sequential, r = {radius.removeprefix('0')}",):
                classifier = f"smoothed, σ {found['settings']['sigma']}"
                lines.append(f"| ℓ2 ≤ {radius} | {classifier} | {proved['text']} | - | {row['samples']['mean']:,.0f} | {proved['n']} |")
    side = found["settings"]["patch"]
    for row in found["patch"]["certificates"]:
        if row["masks"] in ("6x6", "6x6, 2x2 first", "4x4, 2x2 first"):
            cells = f"{row['certified_right']['text']} | {row['accuracy']['text']} | {row['passes']['mean']:.0f} | {row['images']}"
            lines.append(f"| one {side}x{side} patch | double masking, {row['masks']} | {cells} |")
    detected = next(row for row in found["patch"]["certificates"] if row["masks"] == "6x6")
    lines.append(
        f"| one {side}x{side} patch, or alarm | one-mask views, 6x6 | {detected['detection_right']['text']} | - | 36 | {detected['images']} |"
    )
    for row in found["l0"][:1]:
        for pixels in ("1", "4", "8"):
            cells = f"{row['certified'][pixels]['text']} | {row['accuracy']['text']} | {row['passes']['mean']:.0f} | {row['images']}"
            lines.append(f"| {pixels} pixel{'' if pixels == '1' else 's'} | votes over {row['grid']} parts | {cells} |")
    commits = sorted({session["commit"] for session in found["sessions"]})
    machine = found["sessions"][0]["hardware"]
    note = f"[`{found['settings']['model']}`]({found['settings']['model']}), first test images in official order, 95 % Wilson intervals, {machine}, "
    return "\n".join(
        [
            *lines,
            "",
            f"{note}`benchmarks/certification.py` at commit {', '.join(commits)}; commands in [cost.md](docs/certificates/cost.md).",
        ]
    )


TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "ablations": ("ablations.json", "docs/training/ablations.md", ablation_tables.page),
    "budgets": ("budgets.json", "docs/attacks/autoattack.md", budgets_table),
    "certified": ("certification.json", "README.md", certified_table),
    "evaluation": ("evaluation.json", "docs/evaluation/cost.md", evaluation_table),
    "l0-choice": ("l0_choice.json", "docs/certificates/l0.md", l0_choice_table),
    "scale": ("scale.json", "docs/training/scale.md", scale_table),
    "training": ("training.json", "docs/training/cost.md", training_table),
}


def pages() -> dict[Path, str]:
    """Every page that holds a table, with its right content."""
    found: dict[Path, str] = {}
    for name, (source, page, draw) in TABLES.items():
        path, data = ROOT / page, BENCHMARKS / source
        begin, end = f"<!-- {name}: drawn by scripts/benchmark_tables.py -->", f"<!-- /{name} -->"
        text = found.get(path, path.read_text())
        before, mark, rest = text.partition(begin)
        _, closing, after = rest.partition(end)
        assert len(mark) * len(closing) > 0, f"{page} has no place for the table {name!r}"
        table = draw(json.loads(data.read_text())) if data.exists() else "Not measured yet."
        found[path] = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return found


def main(words: list[str]) -> int:
    if words == ["write"]:
        for path, text in pages().items():
            path.write_text(text)
        return 0
    if words == ["check"]:
        stale = [str(p.relative_to(ROOT)) for p, text in pages().items() if p.read_text() != text]
        print(f"not what scripts/benchmark_tables.py would write: {', '.join(stale)}" if stale else "tables agree with results/benchmarks")
        return 1 if stale else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
