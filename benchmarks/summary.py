"""From the benchmark's runs to its tables: medians over repeats, ratios within a repeat, and where the time goes."""

from pathlib import Path
from statistics import median
from typing import Any

from amsdn.errors import InputError

OURS = "amsdn"
START, END = "<!-- benchmark: drawn by benchmarks/attacks.py --docs, do not edit -->", "<!-- /benchmark -->"
GOAL = 2.0  # times as fast as the fastest peer, at equal or lower robust accuracy


def summarise(runs: dict[str, dict[str, Any]], notes: dict[str, str]) -> list[dict[str, Any]]:
    """runs by ``attack/regime/library/repeat`` -> one entry for each attack and regime, ours first, and the verdict on it."""
    grouped: dict[tuple[str, str], dict[str, dict[str, dict[str, Any]]]] = {}
    for key, run in runs.items():
        name, regime, library, repeat = key.split("/")
        grouped.setdefault((name, regime), {}).setdefault(library, {})[repeat] = run
    return [_compare(name, regime, by, notes.get(name, "")) for (name, regime), by in grouped.items() if OURS in by]


def _compare(name: str, regime: str, by_library: dict[str, dict[str, dict[str, Any]]], note: str) -> dict[str, Any]:
    cells = {library: _cell(runs, by_library[OURS]) for library, runs in by_library.items()}
    peers = {library: cell for library, cell in cells.items() if library != OURS and cell["times_ours"] is not None}
    entry: dict[str, Any] = {"attack": name, "regime": regime, "cells": cells, "note": note, "fastest_peer": None, "verdict": "no peer"}
    if peers:
        entry["fastest_peer"] = min(peers, key=lambda p: peers[p]["seconds"])
        entry["verdict"] = _verdict(cells[OURS], peers, entry["fastest_peer"])
    return entry


def _cell(runs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The medians of one library's repeats; times are ratios within a repeat, so that a slow minute hits both."""
    some, n = list(runs.values()), next(iter(runs.values()))["samples"]
    ratios = sorted(run["seconds"] / ours[repeat]["seconds"] for repeat, run in runs.items() if repeat in ours)
    spent = [r["median_spent"] for r in some if r["median_spent"] is not None]
    return {
        "budget": some[0]["budget"],
        "samples": n,
        "batch": some[0]["batch"],
        "repeats": len(some),
        "seconds": median(r["seconds"] for r in some),
        "times_ours": median(ratios) if ratios else None,
        "times_ours_range": [ratios[0], ratios[-1]] if ratios else None,
        "forwards_per_image": median(r["forwards"] for r in some) / n,
        "backwards_per_image": median(r["backwards"] for r in some) / n,
        "images_per_call": median(r["forwards"] / max(r["calls"], 1) for r in some),
        "model_share": median(r["model_seconds"] / r["seconds"] for r in some),
        "robust_accuracy": sum(r["standing"] for r in some) / (n * len(some)),
        "median_spent": median(spent) if spent else None,
    }


def _verdict(ours: dict[str, Any], peers: dict[str, dict[str, Any]], fastest: str) -> str:
    """Whether the goal is met; where not, what the time goes into."""
    peer = peers[fastest]
    weaker = [p for p, cell in peers.items() if cell["robust_accuracy"] < ours["robust_accuracy"] - 1e-9]
    farther = [
        p
        for p, cell in peers.items()
        if ours["median_spent"] and cell["median_spent"] and cell["median_spent"] < 0.99 * ours["median_spent"]
    ]
    strength = f"leaves more standing than {', '.join(weaker)}; " if weaker else ""
    strength += f"finds farther images than {', '.join(farther)}; " if farther else ""
    if peer["times_ours"] >= GOAL:
        return strength + f"{peer['times_ours']:.1f} times as fast as {fastest}"
    passes = (ours["forwards_per_image"] + 2 * ours["backwards_per_image"]) / (peer["forwards_per_image"] + 2 * peer["backwards_per_image"])
    return strength + (
        f"{peer['times_ours']:.1f} times as fast as {fastest}: {passes:.0%} of its passes (a backward counted as two), "
        f"{ours['model_share']:.0%} of our time in the model, {peer['model_share']:.0%} of its"
    )


def table(summary: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        "| attack | budget | library | robust accuracy | seconds | times ours (range) | forwards | backwards | in the model |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for entry in summary:
        for library, cell in entry["cells"].items():
            accuracy = f"{100 * cell['robust_accuracy']:.1f}" + (
                "" if cell["median_spent"] is None else f" (median {cell['median_spent']:.3g})"
            )
            low, high = cell["times_ours_range"] or (None, None)
            ratio = "" if library == OURS or low is None else f"{cell['times_ours']:.2f} ({low:.2f}-{high:.2f})"
            first = [entry["attack"], cell["budget"]] if library == OURS else ["", ""]
            passes = [f"{cell['forwards_per_image']:.0f}", f"{cell['backwards_per_image']:.0f}", f"{100 * cell['model_share']:.0f} %"]
            lines.append("| " + " | ".join([*first, library, accuracy, f"{cell['seconds']:.2f}", ratio, *passes]) + " |")
    lines += ["", *(f"- {e['attack']}, {e['regime']}: {e['verdict']}." + (f" ({e['note']})" if e["note"] else "") for e in summary)]
    return "\n".join(lines)


def draw(document: dict[str, Any], page: Path) -> None:
    """Put the tables between the markers of a page."""
    page.write_text(drawn(document, page.read_text()))


def drawn(document: dict[str, Any], text: str) -> str:
    """The page's text with the tables of the document between its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise InputError(f"the page lacks the markers {START} and {END}; put them where the tables belong")
    return "".join([before, START, "\n\n", origin(document), "\n\n", table(document["summary"]), "\n\n", END, after])


def origin(document: dict[str, Any]) -> str:
    """Where the numbers come from: every session's command and commit, then what they share."""
    last = document["sessions"][-1]
    libraries = ", ".join(f"{name} {found}" for name, found in last["libraries"].items())
    samples = sorted({cell["samples"] for e in document["summary"] for cell in e["cells"].values()})
    runs = "; ".join(f"`{s['command']}` at commit {s['commit']}, {s['date']}" for s in document["sessions"])
    return (
        f"{runs}. {last['cpu']}, {document['settings']['threads']} threads, "
        f"torch {last['versions']['torch']}, {libraries}. {samples[0]} to {samples[-1]} images of the CIFAR-10 test set, all classified correctly; "
        f"robust accuracy in per cent of them; forwards and backwards are images through the model for each image attacked."
    )
