#!/usr/bin/env python
"""Keep the learning curves of results/training/ true.

    python scripts/curves.py add STAGE_FOLDER... NAME   distil finished stages, in order, into results/training/NAME.json
    python scripts/curves.py write                      redraw the curves and results/training/README.md
    python scripts/curves.py check                      exit 1 if they differ from what `write` would make

A stage folder holds the run.json and history.jsonl that an amsdn training command left. At most 200 points a stage are kept,
each the mean over the rows it stands for. Time is training time, stages one after the other. No number is typed by hand.
"""

import hashlib
import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "training"
MOST_POINTS = 200
ORIGIN = (
    "stage",
    "command",
    "commit",
    "date",
    "versions",
    "hardware",
    "seed",
    "seconds",
    "steps",
    "images",
    "budget",
    "clean_accuracy_val",
)
ACCURACIES = {  # how each is named and coloured; middle tones, to be read on white and on black
    "accuracy": ("clean", "#4c8dd6"),
    "accuracy_attacked": ("attacked", "#e0703c"),
    "accuracy_noised": ("noised", "#5aa469"),
    "accuracy_masked": ("masked", "#a77bca"),
    "accuracy_ablated": ("few pixels", "#b39a3d"),
}
INK = "#808080"
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
}


def distil(folder: Path) -> dict[str, Any]:
    """What results/ keeps of one stage: where it came from, and its thinned curve by column."""
    info = json.loads((folder / "run.json").read_text())
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    if not rows:
        raise SystemExit(f"{folder}: its history has no rows; train with a smaller --loop.log-every")
    kept = {key: info.get(key) for key in ORIGIN}
    return kept | {"data": info["data"]["name"], "samples": info["data"]["samples"], "points": thin(rows, MOST_POINTS)}


def thin(rows: list[dict[str, Any]], most: int) -> dict[str, list[float | None]]:
    """Rows as columns of at most ``most`` points: means over consecutive rows, but the last step, images and seconds of each."""
    count = min(most, len(rows))
    edges = [round(i * len(rows) / count) for i in range(count + 1)]
    columns: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        columns[name] = []
        for begin, end in itertools.pairwise(edges):
            found = [row[name] for row in rows[begin:end] if name in row]
            value = None if not found else found[-1] if name in ("step", "images", "seconds") else sum(found) / len(found)
            columns[name].append(None if value is None else float(f"{value:.6g}"))
    return columns


def draw(name: str, result: dict[str, Any]) -> str:
    """The curves as an SVG, the same for the same numbers and version of matplotlib."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        accuracy, loss = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_stages(accuracy, loss, result["stages"])
        accuracy.set(ylabel="accuracy on training batches, %", ylim=(0, 100))
        loss.set(ylabel="loss", xlabel="minutes of training", xlim=(0, None), ylim=(0, None))
        shown = [pair for key, pair in ACCURACIES.items() if any(key in stage["points"] for stage in result["stages"])]
        lines = [Line2D([], [], color=colour, label=label) for label, colour in shown]
        accuracy.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        page = io.StringIO()
        about = f"drawn from {name}.json {digest(result)}"
        figure.savefig(page, format="svg", transparent=True, metadata={"Date": None, "Description": about})
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"


def _draw_stages(accuracy: Axes, loss: Axes, stages: list[dict[str, Any]]) -> None:
    before = 0.0
    for stage in stages:
        points = stage["points"]
        minutes = [before + s / 60 for s in points["seconds"]]
        for key, (_, colour) in ACCURACIES.items():
            if key in points:
                shown = [None if v is None else 100 * v for v in points[key]]
                # Pretraining recognises images, not classes: another accuracy, so another line.
                dashes = "--" if stage["stage"] == "pretrain" else "-"
                accuracy.plot(minutes, _gaps(shown), dashes, color=colour, lw=1.3)
        loss.plot(minutes, _gaps(points["loss"]), color=INK, lw=1.3)
        for axes in (accuracy, loss):
            if before:
                axes.axvline(before, color=INK, lw=0.8, ls=":")
        end = max(minutes[-1], before + (stage["seconds"] or 0) / 60)
        accuracy.annotate(stage["stage"], ((before + end) / 2, 1.03), xycoords=("data", "axes fraction"), ha="center")
        before = end


def _gaps(values: list[float | None]) -> list[float]:
    return [float("nan") if v is None else v for v in values]


def digest(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:12]


def section(name: str, result: dict[str, Any]) -> str:
    """A run's drawing, its stages as a table, and its commands."""
    lines = [
        f"## {name}\n\n![Accuracy and loss over training time]({name}.svg)\n",
        "| stage | training images | images seen | steps | minutes | clean, held out, % |",
        "|---|---|---|---|---|---|",
    ]
    for s in result["stages"]:
        held = s["clean_accuracy_val"]
        right = f"{100 * held['correct'] / held['samples']:.1f} of {held['samples']}" if held else "-"
        lines.append(f"| {s['stage']} | {s['samples']:,} | {s['images']:,} | {s['steps']:,} | {s['seconds'] / 60:.1f} | {right} |")
    lines.append("")
    lines += [
        f"- {s['stage']}: `{s['command']}` at commit {s['commit']}, {s['date']}, {s['data']}, {s['hardware']}, seed {s['seed']}"
        for s in result["stages"]
    ]
    return "\n".join([*lines, "", f"Evidence: [`{name}.json`]({name}.json).", ""])


def chaos_section(found: dict[str, Any]) -> str:
    """What scripts/chaos.py found, as a paragraph."""
    met = ", ".join(f"{count} at {phase}" for phase, count in found["by_phase_met"].items())
    what = {"weights": "weights, bit for bit", "curve": "learning curve", "record": "record", "clean": "no file left half-written"}
    lines = [
        f"## Killed {found['kills']} times\n",
        f"A three-stage run was killed by SIGKILL {found['kills']} times ({met}; {found['fresh_interpreters']} of these processes had "
        "started a fresh interpreter, the others were forked) and started again each time. Against the undisturbed run:\n",
        "| | " + " | ".join(found["equal"]) + " |",
        "|---|" + "---|" * len(found["equal"]),
    ]
    for key, label in what.items():
        lines.append(f"| {label} | " + " | ".join("same" if s[key] else "**differs**" for s in found["equal"].values()) + " |")
    lines[-1] = lines[-1].replace("same", "yes").replace("**differs**", "**no**")
    origin = f"`{found['command']}` at commit {found['commit']}, {found['date']}, {found['hardware']}, seed {found['seed']}"
    return "\n".join([*lines, "", f"- {origin}; {found['seconds'] / 60:.0f} minutes\n"])


def pages() -> dict[Path, str]:
    """Every file that this script owns, with its right content."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))}
    chaos = found.pop("chaos", None)
    sections = [section(name, result) for name, result in found.items()]
    sections += [chaos_section(chaos)] if chaos else []
    intro = (
        "# Learning curves\n\nDrawn by `scripts/curves.py` from the JSON files beside this page. Accuracies are those of training batches as "
        "augmented and attacked at that moment, so they tell how training went, not how robust the model is: see ../README.md for that. "
        "Dashed lines belong to pretraining, which recognises images among a batch and not classes.\n\n"
    )
    files = {FOLDER / f"{name}.svg": draw(name, result) for name, result in found.items()}
    return files | {FOLDER / "README.md": intro + "\n".join(sections)}


def agrees(path: Path, text: str) -> bool:
    """Whether the file holds ``text``; a drawing by another matplotlib need only be of the same numbers."""
    if not path.exists():
        return False
    found = path.read_text()
    if path.suffix != ".svg" or _part("creator", found) == _part("creator", text):
        return found == text
    return _part("description", found) == _part("description", text) != ""


def _part(tag: str, svg: str) -> str:
    found = re.search(rf"<dc:{tag}>(.*?)</dc:{tag}>", svg, re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def main(words: list[str]) -> int:
    if words[:1] == ["add"] and len(words) >= 3:
        result = {"stages": [distil(Path(folder)) for folder in words[1:-1]]}
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{words[-1]}.json").write_text(json.dumps(result) + "\n")
        words = ["write"]
    if words == ["write"]:
        for path, text in pages().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return 0
    if words == ["check"]:
        wrong = [path.name for path, text in pages().items() if not agrees(path, text)]
        print(f"not what scripts/curves.py would write: {', '.join(wrong)}" if wrong else "curves agree with results/training")
        return 1 if wrong else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
