"""docs/training/cost.md's tables, drawn from the JSON of ``benchmarks/training.py``."""

from typing import Any


def training_table(found: dict[str, Any]) -> str:
    """Everything that the file holds, as Markdown."""
    parts = [_beside(found), _agreement(found), _steps(found), _passes(found), _origin(found)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _beside(found: dict[str, Any]) -> list[str]:
    beside = found.get("beside")
    if beside is None:
        return []
    plain = beside["plain_images_per_second"]
    rows = [[name, _times(ratio)] for name, ratio in beside["times_as_fast"].items()]
    return [
        "## Beside the plain loop with torchattacks",
        "",
        *table(["changed", "times as many images a second"], rows, 1),
        "",
        f"PGD-10 adversarial training of the undefended network. The plain loop: {_range(plain)} images a second "
        f"(fp32, NCHW, {found['settings']['workers']} DataLoader workers). Each line changes that one thing in it, except where it says more; "
        "median, least and greatest ratio within a round.",
    ]


def _agreement(found: dict[str, Any]) -> list[str]:
    same = found.get("agreement")
    if same is None:
        return []
    rows = []
    for name in ("before", "plain", "ours"):
        cells = [[run[name][what] for run in same["runs"]] for what in ("loss", "accuracy", "change")]
        rows.append([name, _list(cells[0], 2), _list([100 * v for v in cells[1]], 1), _list([255 * v for v in cells[2]], 3)])
    work = same["gflop_per_image"]
    return [
        "## The same work",
        "",
        *table(["", "loss under PGD-10", "accuracy under PGD-10, %", "greatest change, /255"], rows, 1),
        "",
        f"Both loops in fp32 from the same weights, {same['steps']} steps of {same['batch']} images of {same['data']}, compact of width {same['width']}, "
        f"one figure a seed, on held-out images. Operations an image: plain {work['plain']:.5g} GFLOP, ours {work['ours']:.5g}.",
    ]


def _steps(found: dict[str, Any]) -> list[str]:
    rows = []
    for row in found["steps"]:
        gflop, speed = found["gflop_per_image"][f"{row['model']}, {row['kind']}"], row["images_per_second"]
        share = speed["median"] * gflop / found["peak_gflops"][row["precision"]]
        rows.append([row["model"], row["kind"], row["way"], _range(speed), f"{gflop:.3g}", f"{100 * share:.0f}"])
    peaks = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in found["peak_gflops"].items())
    settings = found["settings"]
    return [
        "## Steps of our loop",
        "",
        *table(["model", "step", "computed in", "images a second", "GFLOP an image", "% of the peak"], rows, 3),
        "",
        f"Batches of {settings['batch']} images of 32 px, flagship: those of `{settings['recipe']}`. Peaks (the fastest matrix product or dense convolution of the same run): {peaks}.",
    ]


def _passes(found: dict[str, Any]) -> list[str]:
    rows = []
    for row in found["passes"]:
        for name, speed in row["images_per_second"].items():
            gflop = row["gflop_per_image"][name.removesuffix(", CUDA graph")]
            if isinstance(speed, str):
                rows.append([row["model"], name, row["way"], f"not possible: {speed}", f"{gflop:.3g}", ""])
                continue
            share = speed * gflop / found["peak_gflops"][row["precision"]]
            rows.append([row["model"], name, row["way"], f"{speed:,.0f}", f"{gflop:.3g}", f"{100 * share:.0f}"])
    head = ["model", "pass", "computed in", "images a second", "GFLOP an image", "% of the peak"]
    return ["## Bare passes", "", *table(head, rows, 3)]


def _origin(found: dict[str, Any]) -> list[str]:
    rounds = found["steps"][0]["images_per_second"]["n"]
    return [
        f"`{found['command']}` at commit {found['commit']}, {found['date']}, {found['hardware']}, torch {found['versions']['torch']}; "
        f"{rounds} round{'' if rounds == 1 else 's'}, timed by {found['clock']}."
    ]


def table(head: list[str], rows: list[list[Any]], words: int) -> list[str]:
    """A Markdown table whose first ``words`` columns are text and the others figures, set to the right."""
    lines = [head, ["---"] * words + ["--:"] * (len(head) - words), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def _times(ratio: dict[str, Any]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _range(speed: dict[str, Any]) -> str:
    return f"{speed['median']:,.4g} ({speed['low']:,.4g} to {speed['high']:,.4g})"


def _list(values: list[float], digits: int) -> str:
    return ", ".join(f"{v:.{digits}f}" for v in values)
