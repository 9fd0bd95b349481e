"""docs/evaluation/cost.md's table, drawn from the JSON of ``benchmarks/evaluation.py``."""

from typing import Any

from training_tables import table

from amsdn.evaluation.statistics import mcnemar, wilson

SIDES = ("ours", "by hand")
NAMES = {"patch": "patch", "sparse": "pixels", "linf": "ℓ∞", "l2": "ℓ2"}
HEAD = ["threat", "seconds, ours", "by hand", "times ours", "passes an image, ours", "by hand", "standing, ours, %", "by hand, %", "p"]


def summarise(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a threat: for both sides seconds, passes and the images that stand under all of its attacks; an attack on several threats is shared evenly.

    Attacks that also evade a detector are left out: only ours has them.
    """
    keys = dict.fromkeys(key for part in document["parts"]["ours"].values() for key in part["standing"])
    return [{"threat": key, **{side: _side(document, side, key) for side in SIDES}} for key in keys]


def _side(document: dict[str, Any], side: str, key: str) -> dict[str, Any]:
    found = [part for part in document["parts"][side].values() if key in part["standing"] and not part.get("evades")]
    each = {what: sum(p[what] / len(p["standing"]) for p in found) for what in ("seconds", "wall_seconds", "forwards", "backwards")}
    standing = [all(images) for images in zip(*(p["standing"][key] for p in found), strict=True)]
    return {**each, "parts": len(found), "outside": sum(p.get("outside", {}).get(key, 0) for p in found), "standing": standing}


def evaluation_table(document: dict[str, Any]) -> str:
    """Everything that the file holds, as Markdown."""
    rows = [_row(line) for line in document["lines"]]
    families = dict.fromkeys(line["threat"].split()[0] for line in document["lines"])
    rows += [_sum(f"{NAMES[f]}, all", [line for line in document["lines"] if line["threat"].split()[0] == f]) for f in families]
    rows.append(_sum("**all**", document["lines"]))
    return "\n".join([*table(HEAD, rows, 1), "", *_notes(document), "", _origin(document)])


def _row(line: dict[str, Any]) -> list[str]:
    ours, theirs = (line[side] for side in SIDES)
    family, budget = line["threat"].split()
    p = mcnemar(ours["standing"], theirs["standing"]).p_value
    name = f"{NAMES[family]} {budget}"
    # The budgets at which several attacks of ours run are the headline's.
    return [f"**{name}**" if ours["parts"] > 1 else name, *_cost([line]), _share(ours["standing"]), _share(theirs["standing"]), f"{p:.2g}"]


def _sum(name: str, lines: list[dict[str, Any]]) -> list[str]:
    return [name, *_cost(lines), "", "", ""]


def _cost(lines: list[dict[str, Any]]) -> list[str]:
    seconds = [sum(line[side]["seconds"] for line in lines) for side in SIDES]
    n = len(lines[0]["ours"]["standing"])
    passes = [" + ".join(f"{sum(line[side][what] for line in lines) / n:,.0f}" for what in ("forwards", "backwards")) for side in SIDES]
    return [*(f"{s:,.1f}" for s in seconds), f"{seconds[1] / seconds[0]:.1f}", *passes]


def _share(standing: list[bool]) -> str:
    low, high = wilson(sum(standing), len(standing))
    return f"{100 * sum(standing) / len(standing):.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _notes(document: dict[str, Any]) -> list[str]:
    """What the columns mean, what did not count, and what only ours does."""
    clean, parts = document["clean"], document["parts"]
    outside = [f"{p['name']} {n} of {p['attacked']} at {key}" for p in parts["by hand"].values() for key, n in p["outside"].items() if n]
    counts: dict[str, int] = {}
    for what, n in ((w, n) for part in parts["by hand"].values() for w, n in part["counts"].items()):
        counts[what] = counts.get(what, 0) + n
    evading = {name: part for name, part in parts["ours"].items() if part.get("evades")}
    notes = [
        f"Standing: in per cent of {len(clean)} images with 95 % Wilson intervals, {sum(clean)} of them right without an attack; p: McNemar's exact test on the same images. "
        "Passes: images through the model, forwards + backwards, for each image. Headline budgets in bold.",
        f"Wrong but outside of the threat, which does not count: {'; '.join(outside) or 'none'}.",
    ]
    if counts:
        notes.append(
            f"Of {counts['patches']} patches that ART made, {counts['larger than the square']} were larger than their square and were cut to it."
        )
    if evading:
        seconds = sum(part["seconds"] for part in evading.values())
        notes.append(
            f"Not in the table, having no counterpart by hand: {', '.join(evading)}, which also evade the detector, {seconds:,.1f} s."
        )
    return [f"- {note}" for note in notes]


def _origin(document: dict[str, Any]) -> str:
    last, settings = document["sessions"][-1], document["settings"]
    libraries = ", ".join(f"{name} {version}" for name, version in last["libraries"].items())
    runs = "; ".join(f"`{s['command']}` at commit {s['commit']}, {s['date']}" for s in document["sessions"])
    return (
        f"{runs}; `{settings['model']}` on {settings['data']}, protocol {settings['protocol'][0]} {settings['protocol'][1]}, {last['hardware']}, "
        f"torch {last['versions']['torch']}, {libraries}, timed by {document['clock']}."
    )
