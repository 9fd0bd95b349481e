"""Training throughput: our loop on every kind of step, beside the loop that a user would write with torchattacks, in one run.

    python benchmarks/training.py [--minutes 8] [--recipe NAME] [--threads 1] [--compile] [--out results/benchmarks/training.json]
    python benchmarks/training.py --quick        # everything once, tiny: does it run on this machine?

Rounds go through all measurements one after another until the minutes are over (always at least one), so that what else happens on
the machine falls on all of them; the medians and the extremes over rounds are kept. The share of the peak is that of the fastest
matrix product or dense convolution in the same run and precision. On a CPU with one thread and no workers the seconds are the process's own.
``scripts/benchmark_tables.py write`` draws docs/training/cost.md from the file.
"""

import argparse
import itertools
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from training_agreement import agreement
from training_machine import convolution_peak, matmul_peak, random_images, spread
from training_passes import pass_flops, passes
from training_plain import PLAIN, SideBySide, installed, ratios
from training_steps import COUNTED, Steps, Way, images_per_second, kinds, models, step_flops
from training_tables import training_table

from amsdn.commands.common import provenance
from amsdn.data import ArraySplit, load_dataset
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes import RECIPES, Recipe, get_recipe
from amsdn.records import write_json
from amsdn.utils.helpers import generator, keep_freed_memory, pick_device

ROOT = Path(__file__).resolve().parents[1]
FLAGSHIP = "cifar10-patch-sparse"  # else the CPU recipe
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Measurement:
    """One cell of the table: a model, a kind of step, a way to compute it."""

    model: str
    kind: str
    way: Way

    @property
    def key(self) -> str:
        return f"{self.model}, {self.kind}, {self.way.name}"


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    recipe: Recipe
    models: dict[str, AMSDNConfig]
    split: ArraySplit  # on the device
    steps: Steps
    process: bool  # time by the process's own seconds
    ways: tuple[Way, ...]

    def measurements(self) -> list[Measurement]:
        """Everything that goes through our loop."""
        return [Measurement(m, k, w) for m, k, w in itertools.product(self.models, kinds(self.recipe), self.ways)]

    def measure(self, what: Measurement, seed: int) -> float:
        """Images a second."""
        config, model = kinds(self.recipe)[what.kind], self.models[what.model]
        steps = replace(self.steps, warm=3) if what.way.compiled else self.steps
        return images_per_second(config, model, what.way, self.split, steps, seed, self.process)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=8.0, help="rounds go on until these are over")
    p.add_argument("--recipe", default=FLAGSHIP if FLAGSHIP in RECIPES else "cifar10-cpu", choices=list(RECIPES), help="whose batches")
    p.add_argument("--samples", type=int, default=2048, help="random training images of 32 px")
    p.add_argument("--batch", type=int, help="images a step (default: 64 on a CPU, 512 on a GPU)")
    p.add_argument("--steps", type=int, help="timed steps of each measurement in a round (default: 3 on a CPU, 12 on a GPU)")
    p.add_argument("--compile", action="store_true", help="compiled steps as well (on a CPU it takes minutes to compile)")
    p.add_argument("--workers", type=int, default=None, help="of the plain loop's DataLoader (default: cores - 1, at most 4)")
    p.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--quick", action="store_true", help="everything once, tiny; the figures mean nothing")
    p.add_argument("--out", type=Path, help="default: results/benchmarks/training.json; with --quick none")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    try:
        benchmark(parser().parse_args(arguments))
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, round by round; the file is written after each round, so that a killed run leaves what it had."""
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    workers = options.workers if options.workers is not None else min(4, len(os.sched_getaffinity(0)) - 1)
    bench = open_bench(options, device, workers)
    side = side_by_side(bench, workers)
    print_plan(bench, side, options)
    document = {
        **provenance(device),
        "clock": "the process's own seconds" if bench.process else "the wall clock",
        "settings": {"recipe": bench.recipe.name, "batch": bench.steps.batch, "timed_steps": bench.steps.timed, "workers": workers},
        "gflop_per_image": {f"{m}, {k}": _gflop(bench, m, k) for m in bench.models for k in kinds(bench.recipe)},
        "passes": measure_passes(bench, options),
        "agreement": None if side is None else measure_agreement(bench, options.quick),
    }
    rounds(bench, side, options, document)
    print(training_table(document))
    return document


def open_bench(options: argparse.Namespace, device: torch.device, workers: int) -> Bench:
    """The recipe, the data and the sizes of this run."""
    cuda, recipe = device.type == "cuda", get_recipe(options.recipe)
    batch = options.batch or (16 if options.quick else 512 if cuda else 64)
    timed = options.steps or (1 if options.quick else 12 if cuda else 3)
    if batch < 8 or timed < 1 or options.samples < batch:
        raise InputError(
            f"needs --batch of at least 8, --steps of at least 1 and --samples of at least a batch, got {batch}, {timed}, {options.samples}"
        )
    images = random_images(options.samples, 32, generator("cpu", "benchmark"))
    labels = torch.randint(0, 10, (options.samples,), generator=generator("cpu", "labels"))
    found = models(recipe, device)
    if options.quick:
        found = {name: replace(config, width=8, fpn_channels=None) if name == "compact" else config for name, config in found.items()}
    ways = [Way(), Way(bf16=True), Way(channels_last=False), Way(bf16=True, channels_last=False)]
    ways += [Way(compiled=True), Way(bf16=True, compiled=True)] if options.compile else []
    process = not cuda and torch.get_num_threads() == 1 and workers == 0
    return Bench(recipe, found, ArraySplit(images, labels).to(device), Steps(batch, timed, 3 if cuda else 1), process, tuple(ways))


def side_by_side(bench: Bench, workers: int) -> SideBySide | None:
    """The comparison with torchattacks, on the recipe's undefended control (a GPU: at ResNet-18 size); None where it is not installed."""
    if not installed():
        print("torchattacks is not installed (make peers): the comparison with its loop is left out")
        return None
    return SideBySide(bench.recipe, control(bench), bench.split, bench.steps, workers, bench.process)


def control(bench: Bench) -> AMSDNConfig:
    """A network without defences, so that both loops compute the same function and the same gradients."""
    name = "preact18" if "preact18" in bench.models else next(iter(bench.models))
    return replace(bench.models[name], fpn=False, attention=False, purification=False)


def print_plan(bench: Bench, side: SideBySide | None, options: argparse.Namespace) -> None:
    """What one round holds."""
    many = bench.measurements()
    print(
        f"plan: {bench.recipe.name}: {', '.join(bench.models)} x {', '.join(kinds(bench.recipe))} x {'; '.join(w.name for w in bench.ways)}"
    )
    beside = "" if side is None else ", then nine ways of PGD-10 training beside torchattacks"
    print(
        f"plan: rounds of {len(many)} measurements of {bench.steps.warm} + {bench.steps.timed} steps of {bench.steps.batch} images{beside}; "
        f"{'one round' if options.quick else f'rounds until {options.minutes:g} minutes are over'}",
        flush=True,
    )


def rounds(bench: Bench, side: SideBySide | None, options: argparse.Namespace, document: dict[str, Any]) -> None:
    """Fill the document: one round after another while there is time for one more like the last."""
    out = options.out or (None if options.quick else ROOT / "results" / "benchmarks" / "training.json")
    started, longest = time.monotonic(), 0.0
    speeds: dict[str, list[float]] = {m.key: [] for m in bench.measurements()}
    peaks: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    beside: list[dict[str, float]] = []
    for seed in itertools.count():
        begun = time.monotonic()
        for name, dtype in PRECISIONS.items():
            peaks[name] += [peak(bench.split.device, dtype) for peak in (matmul_peak, convolution_peak)]
        for what in bench.measurements():
            speeds[what.key].append(bench.measure(what, seed))
        if side is not None:
            beside.append(side.round(seed))
        document |= summary(bench, speeds, peaks, beside)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, document)
        longest = max(longest, time.monotonic() - begun)
        print(f"round {seed + 1}: {longest:.0f} s", flush=True)
        if options.quick or time.monotonic() - started + longest > 60 * options.minutes:
            return


def summary(bench: Bench, speeds: dict[str, list[float]], peaks: dict[str, list[float]], beside: list[dict[str, float]]) -> dict[str, Any]:
    """What the rounds so far come to."""
    found = [
        {
            "model": m.model,
            "kind": m.kind,
            "way": m.way.name,
            "precision": "bf16" if m.way.bf16 else "fp32",
            "images_per_second": spread(speeds[m.key]),
        }
        for m in bench.measurements()
    ]
    return {
        "peak_gflops": {name: max(values) / 1e9 for name, values in peaks.items()},
        "steps": found,
        "beside": {
            "plain_images_per_second": spread([r[PLAIN] for r in beside]),
            "times_as_fast": {name: spread(values) for name, values in ratios(beside).items()},
        }
        if beside
        else None,
    }


def measure_passes(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Bare forward and backward passes of every model, every way."""
    device, repeats = bench.split.device, 1 if options.quick else 5 if bench.split.device.type == "cpu" else 30
    found = []
    for name, config in bench.models.items():
        flops = pass_flops(config, 32, device)
        for way in bench.ways:
            speeds = passes(config, way, 32, bench.steps.batch, repeats, device, bench.process)
            found.append(
                {
                    "model": name,
                    "way": way.name,
                    "precision": "bf16" if way.bf16 else "fp32",
                    "images_per_second": speeds,
                    "gflop_per_image": {k: v / 1e9 for k, v in flops.items()},
                }
            )
    return found


def measure_agreement(bench: Bench, quick: bool) -> dict[str, Any]:
    """On digits, with a network thin enough for many steps: real images that every machine has."""
    data = load_dataset("digits").to(bench.split.device)
    model = AMSDNConfig(variant="compact", width=4, fpn=False, attention=False, purification=False)
    return agreement(bench.recipe, model, data, seeds=1 if quick else 3, steps=2 if quick else 100, batch=32)


def _gflop(bench: Bench, model: str, kind: str) -> float:
    return step_flops(kinds(bench.recipe)[kind], bench.models[model], bench.split, COUNTED) / 1e9


if __name__ == "__main__":
    sys.exit(main())
