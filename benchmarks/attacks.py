"""Our attacks and the peer libraries' side by side, in one run, on one machine: time, passes through the model, what stands.

    python benchmarks/attacks.py [--samples N] [--only pgd-50 ...] [--out results/benchmarks/attacks.json]
    python benchmarks/attacks.py --docs docs/attacks/peers.md      # draw the tables from the JSON, run nothing

Every run gets the same images (all classified correctly), one batch, the same threat, steps and queries, and the same
network with frozen weights. Runs are interleaved (ours, peer, peer, ours, peer, peer ...), passes are counted by a wrapper
around the network whoever calls it, and one judge decides what stands. Each run is written when it is done: a killed
benchmark goes on where it stopped.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from outcome import run_or_draw
from peer_attacks import MODULES, PACKAGES, installed, libraries, run_peer
from rows import FACTOR, ROWS, SLOW, Row
from summary import draw, summarise, table
from torch import Tensor
from victims import ROOT, Counted, load_cifar10, load_resnet20, missing

from amsdn.commands.common import provenance
from amsdn.errors import InputError
from amsdn.records import config_hash, write_json
from amsdn.threats import ThreatModel
from amsdn.utils.helpers import generator, keep_freed_memory

OURS = "amsdn"


@dataclass(frozen=True)
class Run:
    """One attack of one library at one budget, once."""

    row: Row
    regime: str
    library: str
    repeat: int

    @property
    def key(self) -> str:
        return f"{self.row.name}/{self.regime}/{self.library}/{self.repeat}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="at most this many images for each attack (default: what each can afford)")
    parser.add_argument("--only", nargs="+", choices=[r.name for r in ROWS], help="these attacks only")
    parser.add_argument("--libraries", nargs="*", choices=list(MODULES), help="these peers only (default: all that are installed)")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="all steps and queries times this")
    parser.add_argument("--repeats", type=int, help="runs of each (default: one to three)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--slow", action="store_true", help="also the peers' attacks that take minutes for a handful of images")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "attacks.json")
    parser.add_argument("--docs", type=Path, help="draw the tables of --out into this page and run nothing")
    options = parser.parse_args(arguments)
    return run_or_draw(options, benchmark, draw)


def benchmark(options: argparse.Namespace) -> None:
    """Run what the file does not yet hold, then print the table."""
    why = missing()
    if why:
        raise InputError(f"the public ResNet-20 is {why}; put the shared data beside the repository")
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = Counted(load_resnet20())
    todo = list(_runs(options))
    settings = {"samples": options.samples, "steps_scale": options.steps_scale, "threads": torch.get_num_threads()}
    images = _images(model, max(_samples(r.row, options) for r in todo))
    document = _open(options.out, settings)
    todo = [r for r in todo if r.key not in document["runs"]]
    _print_plan(todo, model, images, options)
    document["sessions"].append(provenance(images[0].device, cpu=_cpu(), libraries=_versions()))
    for run in todo:
        n = _samples(run.row, options)
        document["runs"][run.key] = _measure(run, model, images[0][:n], images[1][:n], options.steps_scale)
        document["summary"] = summarise(document["runs"], {r.name: r.note for r in ROWS})
        write_json(options.out, document)
        print(_line(run, document["runs"][run.key]), flush=True)
    print(table(document["summary"]))


def _runs(options: argparse.Namespace) -> Iterator[Run]:
    """Ours and the peers' in turn, as often as each is repeated."""
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        peers = libraries(row.family) if row.family else []
        if options.libraries is not None:
            peers = [p for p in peers if p in options.libraries]
        peers = [p for p in peers if installed(p) and (options.slow or (row.family, p) not in SLOW)]
        for regime in row.budgets:
            for repeat in range(options.repeats or row.repeats):
                yield from (Run(row, regime, library, repeat) for library in (OURS, *peers))


def _samples(row: Row, options: argparse.Namespace) -> int:
    return min(row.samples, options.samples or row.samples)


def _images(model: Counted, n: int) -> tuple[Tensor, Tensor]:
    """The first n test images that the network classifies correctly."""
    x, y = load_cifar10(min(2 * n + 10, 10_000))
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:n]
    return x[right], y[right]


def _measure(run: Run, model: Counted, x: Tensor, y: Tensor, scale: float) -> dict[str, Any]:
    """One run, after a tiny one that imports the library and warms the machine up."""
    row, budget = run.row, run.row.budgets[run.regime]
    attack = row.attack(budget, scale)

    def once(x: Tensor, y: Tensor, scale: float) -> Tensor:
        if run.library == OURS:
            return row.attack(budget, scale)(model, x, y, generator=generator(x.device, "benchmark", run.repeat)).x_adv
        assert row.family is not None
        return run_peer(row.family, run.library, model, x, y, seed=run.repeat, **row.peer_settings(budget, scale))

    once(x[:2], y[:2], min(scale, 0.02))
    model.reset()
    wall, processor = time.perf_counter(), time.process_time()
    x_adv = once(x, y, scale)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    counted = {"forwards": model.forwards, "backwards": model.backwards, "calls": model.calls, "model_seconds": model.seconds}
    judge = attack.threat if row.judged is None else attack.threat.with_budget(row.judged)
    with torch.no_grad():
        fooled = model(x_adv).argmax(1) != y
    return {
        "budget": _budget(judge),
        "settings": row.peer_settings(budget, scale) if row.unit else row.scaled(scale),
        "samples": len(x),
        "batch": len(x),
        "seconds": wall,
        "cpu_seconds": processor,
        **counted,
        "standing": int((~fooled | ~judge.contains(x_adv.clamp(0, 1), x)).sum()),
        "median_spent": float(torch.where(fooled, judge.spent(x_adv, x), torch.inf).median()) if row.judged is not None else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _budget(threat: ThreatModel) -> str:
    """``linf 0.5/255``: the share of a pixel value also where it is not whole."""
    value = threat.budget
    return f"linf {255 * float(value):g}/255" if threat.family == "linf" else threat.describe()


def _open(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The file to go on with, or a new one. Raises InputError for one that was made with other settings."""
    if not path.exists():
        return {"config": config_hash(settings), "settings": settings, "sessions": [], "runs": {}, "summary": []}
    document: dict[str, Any] = json.loads(path.read_text())
    if document["config"] != config_hash(settings):
        raise InputError(f"{path} was made with {document['settings']}, this run has {settings}; delete it or choose another --out")
    return document


def _print_plan(todo: list[Run], model: Counted, images: tuple[Tensor, Tensor], options: argparse.Namespace) -> None:
    """What will run and about how long it takes, by the measured cost of a pass and the passes of images that stand to the end."""
    forward, gradient = _cost(model, images[0][:16])
    total = 0.0
    for name in dict.fromkeys(r.row.name for r in todo):
        runs = [r for r in todo if r.row.name == name]
        seconds = 0.0
        for run in runs:
            forwards, backwards = run.row.passes(run.row.scaled(options.steps_scale))
            share = {"small": 0.7, "usual": 0.15 if run.library == OURS else 0.4}.get(run.regime, 0.8)
            work = max(forwards - backwards, 0) * forward + backwards * gradient
            seconds += share * FACTOR.get((run.row.family or "", run.library), 1.0) * _samples(run.row, options) * work
        who = ", ".join(dict.fromkeys(r.library for r in runs))
        print(f"plan: {name:12} {_samples(runs[0].row, options):4} images, {len(runs):3} runs ({who}), about {seconds:5.0f} s")
        total += seconds
    print(
        f"plan: about {total / 60:.1f} minutes on {torch.get_num_threads()} threads ({1e3 * forward:.2f} ms a forward, {1e3 * gradient:.2f} a gradient)"
    )


def _cost(model: Counted, x: Tensor) -> tuple[float, float]:
    """Seconds an image for a forward pass, and for a forward and a backward pass."""
    times = []
    for gradient in (False, True, False, True):
        start = time.perf_counter()
        for _ in range(5):
            leaf = x.clone().requires_grad_(gradient)
            logits = model(leaf)
            if gradient:
                torch.autograd.grad(logits.sum(), leaf)
        times.append((time.perf_counter() - start) / 5 / len(x))
    return times[2], times[3]


def _line(run: Run, result: dict[str, Any]) -> str:
    stands = f"{result['standing']}/{result['samples']}"
    passes = f"{result['forwards']} forwards, {result['backwards']} backwards"
    return (
        f"{run.key:40} {result['seconds']:8.2f} s, {passes}, {result['model_seconds'] / result['seconds']:.0%} in the model, {stands} stand"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for library, package in PACKAGES.items():
        try:
            found[library] = version(package)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


if __name__ == "__main__":
    sys.exit(main())
