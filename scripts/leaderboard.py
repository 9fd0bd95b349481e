#!/usr/bin/env python
"""Keep the leaderboard of results/leaderboard/ true: one JSON file for each model, data set, protocol and version.

    python scripts/leaderboard.py add RUN_FOLDER NAME   distil a run of `amsdn evaluate --protocol ...` into an entry
    python scripts/leaderboard.py write                 redraw results/leaderboard/README.md
    python scripts/leaderboard.py check                 exit 1 if an entry lacks its evidence, or the page is not what `write` would make

An entry holds every headline number with count and interval, the verdict of the reliability checks, every attack's configuration, the digest of
the rows, and command, commit, versions, hardware and seconds. A number that failed a check stays, struck through. No number is typed by hand.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from amsdn.errors import InputError
from amsdn.evaluation.evaluate import RECORDS
from amsdn.evaluation.headline import Run
from amsdn.evaluation.headline_rows import headline_rows
from amsdn.evaluation.protocol import EFFORTS, VERSION, Protocol
from amsdn.evaluation.report import load_runs
from amsdn.records import canonical

ROOT = Path(__file__).resolve().parents[1]
BOARD = ROOT / "results" / "leaderboard"
ORIGIN = ("command", "commit", "date", "versions", "hardware", "seed", "seconds", "model", "data")
FAMILIES = ("patch", "sparse", "linf", "l2")
INTRO = """# Leaderboard

Drawn by `scripts/leaderboard.py` from the JSON files beside this page. Per cent of the first test images in official order, with 95 % Wilson intervals; each robust
number is the worst case over all attacks of that threat, per image, and the last column over all threats. A number that failed a reliability check is struck
through, and the entry's file says which ([protocols](../../docs/evaluation/protocols.md)). To add a model: `amsdn evaluate --protocol standard --model X --data Y --out DIR`,
then `python scripts/leaderboard.py add DIR NAME`.
"""


def entry_of(folder: Path, name: str) -> dict[str, Any]:
    """The entry of a run folder; raises InputError where it was not made by a protocol."""
    run: Run = load_runs({name: folder})[0]
    stage = (run.info.get("stages") or {}).get("evaluate") or {}
    if not stage.get("protocol"):
        raise InputError(f"{folder}: was not made by a protocol; run amsdn evaluate --protocol standard")
    rows = [
        {"key": row.key, "label": row.label, "cell": dataclasses.asdict(row.cells[0]), "doubts": list(row.doubts[0])}
        for row in headline_rows([run])
        if row.cells[0]
    ]
    return {
        "name": name,
        "protocol": {**stage["protocol"], "side": run.info["data"]["image_size"]},
        "samples": run.summary["samples"],
        **{key: run.info.get(key) for key in ORIGIN},
        "attacks": stage["attacks"],
        "reliable": {family: told["reliable"] for family, told in (run.checks or {}).items()},
        "rows_sha256": hashlib.sha256((folder / RECORDS).read_bytes()).hexdigest(),
        "rows": rows,
    }


def lacks(entry: dict[str, Any]) -> list[str]:
    """What an entry's numbers lack to be believed; nothing where all is there."""
    told, missing = entry["protocol"], [key for key in ORIGIN if not entry.get(key) and entry.get(key) != 0]
    if told["name"] not in EFFORTS:
        return [f"protocol {told['name']} is unknown"]
    if entry["samples"] != EFFORTS[told["name"]].samples:
        missing.append(f"{EFFORTS[told['name']].samples} images (has {entry['samples']})")
    if "changes" in str(entry["commit"]) or entry["commit"] == "unknown":
        missing.append(f"a commit without changes (has {entry['commit']})")
    missing += [f"checks of {family}" for family in ("model", *FAMILIES) if family not in entry["reliable"]]
    missing += [f"a row for {family}" for family in FAMILIES if not any(row["key"] == f"worst:{family}" for row in entry["rows"])]
    for row in entry["rows"]:
        cell = row["cell"]
        if not (cell["n"] > 0 and cell["low"] <= cell["value"] <= cell["high"]):
            missing.append(f"count and interval of {row['label']}")
    return missing + _attacks_missing(entry)


def _attacks_missing(entry: dict[str, Any]) -> list[str]:
    """The protocol's attacks that the entry lacks or has with other settings; of another version only that there are any."""
    if entry["protocol"]["version"] != VERSION:
        return [] if entry["attacks"] else ["attacks"]
    protocol = Protocol(entry["protocol"]["name"], entry["protocol"]["side"])
    wanted = {name: json.loads(json.dumps(canonical(attack))) for name, attack in protocol.attacks(nn.Identity()).items()}
    return [f"the protocol's {name}" for name, attack in wanted.items() if entry["attacks"].get(name) != attack]


def page(entries: dict[str, dict[str, Any]]) -> str:
    """The tables, one for each protocol, version and data set."""
    groups: dict[tuple[str, int, str], list[str]] = {}
    for stem, entry in entries.items():
        key = entry["protocol"]["name"], entry["protocol"]["version"], entry["data"]["name"]
        groups.setdefault(key, []).append(stem)
    return INTRO + "".join(f"\n{_table(key, [entries[stem] for stem in stems], stems)}" for key, stems in sorted(groups.items()))


def _table(key: tuple[str, int, str], entries: list[dict[str, Any]], stems: list[str]) -> str:
    protocol, version, data = key
    columns = ["clean", *(f"worst:{family}" for family in FAMILIES), "union"]
    labels = {row["key"]: row["label"] for entry in entries for row in entry["rows"]}
    order = sorted(range(len(entries)), key=lambda i: -_value(entries[i], "union"))
    lines = [
        f"## {data}, protocol {protocol}, version {version}\n",
        "| model | " + " | ".join(labels.get(c, c) for c in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for i in order:
        cells = " | ".join(_cell(entries[i], column) for column in columns)
        lines.append(f"| [{entries[i]['name']}]({stems[i]}.json) | {cells} |")
    origins = [f"- {e['name']}: `{_last(e['command'])}` at commit {e['commit']}, {e['samples']} images, {e['hardware']}" for e in entries]
    return "\n".join(lines) + "\n\n" + "\n".join(origins) + "\n"


def _last(command: Any) -> str:
    return str(command[-1] if isinstance(command, list) else command)


def _row(entry: dict[str, Any], key: str) -> dict[str, Any] | None:
    return next((row for row in entry["rows"] if row["key"] == key), None)


def _value(entry: dict[str, Any], key: str) -> float:
    row = _row(entry, key)
    return row["cell"]["value"] if row else -1.0


def _cell(entry: dict[str, Any], key: str) -> str:
    row = _row(entry, key)
    if row is None:
        return "-"
    cell = row["cell"]
    text = f"{100 * cell['value']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    return f"~~{text}~~" if row["doubts"] else text


def main(words: list[str]) -> int:
    if words[:1] == ["add"] and len(words) == 3:
        try:
            entry = entry_of(Path(words[1]), words[2])
        except InputError as e:
            print(e, file=sys.stderr)
            return 2
        told = entry["protocol"]
        BOARD.mkdir(parents=True, exist_ok=True)
        (BOARD / f"{words[2]}.{told['name']}-{told['version']}.json").write_text(json.dumps(entry, indent=1) + "\n")
        words = ["write"]
    entries = {path.stem: json.loads(path.read_text()) for path in sorted(BOARD.glob("*.json"))}
    if words == ["write"]:
        (BOARD / "README.md").write_text(page(entries))
        return 0
    if words == ["check"]:
        problems = [f"{stem}: lacks {', '.join(missing)}" for stem, entry in entries.items() if (missing := lacks(entry))]
        if not (BOARD / "README.md").exists() or (BOARD / "README.md").read_text() != page(entries):
            problems.append("README.md: not what scripts/leaderboard.py would write")
        print("\n".join(problems) if problems else f"{len(entries)} entries have their evidence")
        return 1 if problems else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
