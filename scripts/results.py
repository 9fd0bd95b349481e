#!/usr/bin/env python
"""Keep results/ and the README's tables true.

    python scripts/results.py add RUN_OR_REPORT_FOLDER NAME   distil a report.json into results/NAME.json
    python scripts/results.py write                           redraw results/README.md and the table in README.md
    python scripts/results.py check                           exit 1 if they differ from what `write` would make

A result keeps the headline rows with their counts and intervals, and for every run its command, commit, date,
versions, hardware, seeds and seconds. No number is typed by hand.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
BEGIN, END = "<!-- results: drawn by scripts/results.py -->", "<!-- /results -->"
ORIGIN = ("command", "commit", "date", "versions", "hardware", "seed", "seconds", "data", "stages")


def distil(report: dict[str, Any]) -> dict[str, Any]:
    """The part of a report.json that results/ keeps."""
    rows = [{key: row[key] for key in ("key", "label", "note", "group", "cells")} for row in report["headline"]]
    runs = {}
    for name, run in report["runs"].items():
        info, summary = run["run"], run["summary"]
        attacks = {
            attack: {k: found[k] for k in ("family", "budget", "robust_accuracy", "mean_forwards", "mean_backwards") if k in found}
            for attack, found in summary["attacks"].items()
        }
        runs[name] = {key: info.get(key) for key in ORIGIN} | {"model": info.get("model"), "attacks": attacks, "curves": summary["curves"]}
    return {"title": report["title"], "headline": rows, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """The headline rows as Markdown."""
    names = list(result["runs"])
    lines = ["| | " + " | ".join(names) + " | images |", "|---|" + "---|" * (len(names) + 1)]
    for row in result["headline"]:
        cells = [row["cells"].get(name) for name in names]
        counts = "/".join(dict.fromkeys(str(c["n"]) for c in cells if c))
        lines.append(f"| {row['label']} | " + " | ".join(map(_cell, cells)) + f" | {counts} |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{100 * cell['value']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def origin(result: dict[str, Any]) -> str:
    """Where the numbers come from, as Markdown list items."""
    lines = []
    for name, run in result["runs"].items():
        commands = run["command"] if isinstance(run["command"], list) else [run["command"]]
        seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in (run["seconds"] or {}).items())
        lines.append(
            f"- {name}: `{'`, `'.join(commands)}` at commit {run['commit']}, {run['date']}, {run['hardware']}, seed {run['seed']}; {seconds}"
        )
    return "\n".join(lines)


def section(name: str, result: dict[str, Any]) -> str:
    return (
        f"### {result['title']}\n\nPer cent of test images with 95 % Wilson intervals. Robust rows are the worst case over all attacks of that threat, "
        f"per image. Evidence: [`results/{name}.json`](results/{name}.json).\n\n{table(result)}\n\n{origin(result)}\n"
    )


def pages() -> dict[Path, str]:
    """Every file that this script owns or owns a part of, with its right content."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    body = "\n".join(section(name, result) for name, result in found.items())
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    listing = "# Measured results\n\nDrawn by `scripts/results.py` from the JSON files beside this page; LOG.md tells what was tried and lost.\n\n"
    return {
        readme: f"{before}{BEGIN}\n\n{body}\n{END}{after}",
        RESULTS / "README.md": listing + body.replace("](results/", "]("),
    }


def main(words: list[str]) -> int:
    if words[:1] == ["add"] and len(words) == 3:
        report = json.loads((Path(words[1]) / "report.json").read_text())
        (RESULTS / f"{words[2]}.json").write_text(json.dumps(distil(report), indent=1) + "\n")
        words = ["write"]
    if words == ["write"]:
        for path, text in pages().items():
            path.write_text(text)
        return 0
    if words == ["check"]:
        stale = [str(p.relative_to(ROOT)) for p, text in pages().items() if not p.exists() or p.read_text() != text]
        print(f"not what scripts/results.py would write: {', '.join(stale)}" if stale else "results and tables agree")
        return 1 if stale else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
