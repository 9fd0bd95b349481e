"""The tables of ``benchmarks/certification.py``, drawn from its JSON into the terminal and into docs/certificates/cost.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from amsdn.errors import InputError

START, END = "<!-- certificates: drawn by benchmarks/certification.py --docs, do not edit -->", "<!-- /certificates -->"
NEW_PAGE = f"# What certificates cost\n\n{START}\n{END}\n"
SAMPLES_GOAL, LOST_GOAL, PASSES_GOAL = 1600, 0.2, 60  # mean samples at r = .25, points, mean passes of 666


def draw(document: dict[str, Any], page: Path) -> None:
    """Put the tables between the markers of a page, which is made where it does not exist."""
    text = page.read_text() if page.exists() else NEW_PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(drawn(document, text))


def drawn(document: dict[str, Any], text: str) -> str:
    """The page's text with the tables of the document between its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise InputError(f"the page lacks the markers {START} and {END}; put them where the tables belong")
    return "".join([before, START, "\n\n", tables(document), "\n\n", END, after])


def tables(document: dict[str, Any]) -> str:
    """All parts that the document holds, as Markdown, and where they come from."""
    parts: dict[str, Callable[[Any], list[str]]] = {"l2": _l2, "replay": _replay, "patch": _patch, "l0": _l0, "art": _art}
    lines = [f"- {verdict}" for verdict in goals(document)]
    for part, write in parts.items():
        if part in document:
            lines += ["", *write(document[part])]
    return "\n".join([*lines, "", *_origin(document)])


def goals(document: dict[str, Any]) -> list[str]:
    """Whether each goal of the issue is met, with the figure."""
    found = []
    for place, lines in (("the benchmark's images", document.get("l2", [])), ("Cohen's images", document.get("replay", []))):
        for line in lines:
            if line["procedure"] != "sequential, r = .25":
                continue
            mean = line["samples"] if place.startswith("Cohen") else line["samples"]["mean"]
            lost = line["lost"]["0.25"]
            points = lost["points"]["mean"] if place.startswith("Cohen") else lost["points"]
            on = f"{lost['n']} shared images" if "n" in lost else f"{line['images']} images, {line['repeats']} repeats"
            found.append(f"{_met(mean <= SAMPLES_GOAL)}: {mean:,.0f} samples an image at r = .25 on {place} (goal {SAMPLES_GOAL:,})")
            found.append(f"{_met(points <= LOST_GOAL)}: {points:.2f} points of certified accuracy lost there ({on}; goal {LOST_GOAL})")
    for line in document.get("patch", {}).get("certificates", []):
        mean, proved = line["passes"]["mean"], 100 * line["certified_right"]["value"]
        found.append(
            f"{_met(mean <= PASSES_GOAL)}: {mean:.1f} passes a patch certificate, {line['masks']}, which certify {proved:.1f} % (goal {PASSES_GOAL}; "
            "666 are all pairs of 6x6 masks)"
        )
        if line["plain"]:
            wrong, images = line["plain"]["only_ours"], line["plain"]["images"]
            found.append(
                f"{_met(wrong == 0)}: {wrong} of {images} images certified under {line['masks']} masks that plain masking does not certify"
            )
    return found


def _met(met: bool) -> str:
    return "met" if met else "not met"


def _l2(lines: list[dict[str, Any]]) -> list[str]:
    rows = []
    for line in lines:
        lost = {r: _lost(found) for r, found in line["lost"].items()}
        certified = {r: found["text"] for r, found in line["certified"].items()}
        rows.append(
            [
                line["procedure"],
                line["images"],
                _mean(line["samples"], 0),
                f"{line['median_samples']:,}",
                f"{line['seconds_per_image']:.3g}",
                f"{line['samples_per_second']:,.0f}",
                *(certified.get(r, "") for r in ("0.25", "0.5")),
                *(lost.get(r, "") for r in ("0.25", "0.5")),
            ]
        )
    head = ["procedure", "images", "samples an image", "median", "s an image", "samples a second"]
    head += ["right and certified at .25, %", "at .5", "points lost at .25", "at .5"]
    note = "Points lost: against the fixed n, on the images that both certified; in brackets the interval of the share that only the fixed n certified."
    return ["## Smoothing, measured", "", *_table(head, rows, 1), "", note]


def _lost(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['points']:.1f} [{found['low']:.1f}, {found['high']:.1f}] of {found['n']} images"


def _replay(lines: list[dict[str, Any]]) -> list[str]:
    rows = []
    for line in lines:
        for r, lost in line["lost"].items():
            share = [f"{100 * lost['fixed']:.2f}", f"{100 * lost['ours']:.2f}", _mean(lost["points"], 2)]
            rows.append([line["procedure"], f"{line['samples']:,.0f}", r, *share, line["repeats"]])
    head = ["procedure", "samples an image", "radius", "fixed n, %", "ours, %", "points lost", "repeats"]
    note = (
        f"The {lines[0]['images']} images of Cohen's published log (ResNet-110, sigma .25), whose hit probabilities follow from the published radii; "
        "images that he abstained on are given 1/2. The fixed n is exact in expectation, ours simulated; the interval is over repeats."
    )
    return ["## Smoothing, replayed on published images", "", *_table(head, rows, 1), "", note]


def _patch(found: dict[str, Any]) -> list[str]:
    rows, plain = [], []
    for line in found["certificates"]:
        passes = [_mean(line[key], 1) for key in ("passes", "passes_certified", "passes_failed")]
        shares = [line[key]["text"] for key in ("certified_right", "detection_right", "accuracy")]
        rows.append([line["masks"], line["side"], line["images"], *shares, *passes, f"{line['seconds_per_image']:.3g}"])
        if line["plain"]:
            p = line["plain"]
            per = [p["passes"], _mean(p["row_by_row"], 1), _mean(p["ours_on_the_same"], 1), f"{p['seconds_per_image']:.3g}"]
            plain.append([line["masks"], p["images"], *per, p["certified"]["text"], p["only_plain"], p["only_ours"]])
    head = ["masks", "side, px", "images", "right and certified, %", "certified detection, %", "right, %"]
    head += ["passes", "where certified", "where not", "s an image"]
    other = ["masks", "images", "plain passes", "row by row", "ours", "plain, s an image", "plain certified, %", "only plain", "only ours"]
    return [
        "## Patch certificates",
        "",
        *_table(head, rows, 1),
        "",
        "Against all pairs (plain), and against the pairs in their order until one fails (row by row, which is told the label), on the same images:",
        "",
        *_table(other, plain, 1),
        "",
        "Only plain: images that nothing but our tolerance for rounding leaves without a certificate. Only ours: must be 0.",
        "",
        "## Patch-robust answers",
        "",
        *_inference(found["inference"]),
    ]


def _inference(lines: list[dict[str, Any]]) -> list[str]:
    keys = ("algorithm_1", "challenger", "their_algorithm_1", "their_challenger")
    rows = []
    for line in lines:
        passes = [_mean(line.get(key), 1) for key in keys]
        rows.append([line["masks"], line["images"], line["challenger"]["n"], line["challenger_accuracy"]["text"], *passes])
    head = [
        "masks",
        "images",
        "n",
        "right, %",
        "Algorithm 1",
        "challenger",
        "Algorithm 1, PatchCleanser's order",
        "challenger, PatchCleanser's order",
    ]
    return [*_table(head, rows, 2), "", "Mean passes an answer, first round included. The attack is on the bare model."]


def _l0(lines: list[dict[str, Any]]) -> list[str]:
    radii = list(lines[0]["certified"])
    rows = [
        [
            line["grid"],
            line["images"],
            line["accuracy"]["text"],
            f"{line['median']:g}",
            *(line["certified"][r]["text"] for r in radii),
            f"{line['passes']['mean']:.0f}",
            f"{line['seconds_per_image']:.3g}",
        ]
        for line in lines
    ]
    head = ["grid", "images", "right, %", "median radius", *(f"{r} pixel{'s' * (r != '1')}, %" for r in radii), "passes", "s an image"]
    note = "The median radius is over all images; one that is not answered rightly, or not surely, counts as -1."
    return ["## Votes over disjoint pixels", "", *_table(head, rows, 1), "", note]


def _art(found: dict[str, Any]) -> list[str]:
    rows = []
    for line in found["speed"]:
        low, high = line["times_range"]
        speeds = [
            f"{line[who][key]:,.{digits}f}"
            for key, digits in (("images_per_second", 3), ("samples_per_second", 0))
            for who in ("ours", "art")
        ]
        radii = [f"{line[who]['mean_radius']:.3f}" for who in ("ours", "art")]
        rows.append([f"{line['n']:,}", line["images"], *speeds, f"{line['times']:.2f} ({low:.2f} to {high:.2f})", *radii])
    head = [
        "n",
        "images",
        "images a second, ours",
        "ART",
        "samples a second, ours",
        "ART",
        "times as fast (range)",
        "mean radius, ours",
        "ART",
    ]
    lines = ["## Beside ART's smoothing", "", *_table(head, rows, 0), ""] if rows else []
    memory = [
        [line["library"], f"{line['n']:,}", *(f"{line[part][place]:,.0f}" for place in line["peak"] for part in ("peak", "grown"))]
        for line in found["memory"]
    ]
    places = list(found["memory"][0]["peak"]) if memory else []
    titles = [title for place in places for title in (f"peak, {place}, MiB", "of it by the certificate")]
    if memory:
        lines += ["## Memory of one smoothing certificate", "", *_table(["library", "n", *titles], memory, 1)]
    return lines


def _mean(found: dict[str, Any] | None, digits: int) -> str:
    """``12.3 [11.0, 13.6]``; empty where there is nothing."""
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['mean']:,.{digits}f}"
    return f"{found['mean']:,.{digits}f} [{found['low']:,.{digits}f}, {found['high']:,.{digits}f}]"


def _table(head: list[str], rows: list[list[Any]], words: int) -> list[str]:
    """Markdown with the first ``words`` columns to the left, the others to the right."""
    rule = "|" + "---|" * words + "--:|" * (len(head) - words)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def _origin(document: dict[str, Any]) -> list[str]:
    s = document["settings"]
    about = f"Model `{s['model']}` (fingerprint {s['fingerprint']}) on {s['data']}, sigma {s['sigma']:g}, alpha .001, patches of {s['patch']} pixels a side, coarser masks from a confidence of {s['confidence']:g}."
    runs = [
        f"- {', '.join(run['parts'])}: `{run['command']}` at commit {run['commit']}, {run['date']}, {run['hardware']}, torch {run['versions']['torch']}"
        + (f", ART {run['art']}" if run["art"] else "")
        for run in document["sessions"]
    ]
    return [about, "", *runs]
