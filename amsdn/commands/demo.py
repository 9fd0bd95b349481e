"""``amsdn demo``: the whole story once, on digits, on a CPU, in minutes.

An undefended control and the defended model are trained, attacked with the same suite, certified, and put into one
report. Every part resumes, so a demo that was interrupted goes on where it was; delete its folder to start over.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amsdn.commands.certifying import Certifying, certify
from amsdn.commands.common import open_data
from amsdn.commands.measuring import Measured, fitting, measure
from amsdn.commands.options import parse
from amsdn.commands.stages import StageRun, run_stage
from amsdn.data import Dataset
from amsdn.evaluation.report import build_report, terminal_table
from amsdn.models.storage import load_model
from amsdn.recipes import Recipe, get_recipe
from amsdn.training.budget import parse_budget
from amsdn.training.ranks import Ranks, joined
from amsdn.utils.helpers import pick_device

CONTROL, DEFENDED = "control", "AMSDN"


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``amsdn demo``."""

    recipe: str = "digits-demo"
    data: str | None = None  # default: the recipe's
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    out: Path = Path("runs/demo")
    device: str = "auto"  # auto, cpu or cuda
    # Time for training the defended model, such as 10min, which the recipe divides among its stages; none: no limit. Default: the recipe's.
    budget: str | None = None


def run(args: Sequence[str]) -> None:
    """Train, attack, certify, report."""
    options = parse(DemoOptions(), args, "demo", "Everything once.\n\nExample: amsdn demo --out runs/demo")
    started = time.monotonic()
    recipe = get_recipe(options.recipe)
    budget = recipe.budget if options.budget is None else options.budget
    budget_s = None if budget is None or budget.lower() == "none" else parse_budget(budget)
    device = pick_device(options.device)
    dataset = open_data(options.data or recipe.data, options.data_root, options.limit, device)
    with joined(device) as ranks:
        models = _train(recipe, dataset, options.out, device, budget_s, ranks)
    if not ranks.first:
        return  # several processes train together; one evaluates
    how = Certifying(recipe.smoothing, recipe.recheck, recipe.patch, recipe.pixels, recipe.defence_attacks)
    for name, folder in models.items():
        _step(f"attack {name}")
        measured = Measured(load_model(folder, device), str(folder), dataset, options.out / name, device)
        measure(measured, fitting(recipe.attacks, measured.model), recipe.evaluate, recipe.samples, recipe.headline)
        _step(f"certify {name}")
        certify(measured, recipe.certificates, how, recipe.certified_samples)
    runs = {name: options.out / name for name in (DEFENDED, CONTROL)}
    page = build_report(runs, options.out, title=f"AMSDN on {dataset.name}")
    print(f"\n{terminal_table(runs)}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes. Try it on a picture:  amsdn predict IMAGE.png --model {models[DEFENDED]}")
    print(f"report: {page}")


def _train(recipe: Recipe, dataset: Dataset, out: Path, device: torch.device, budget_s: float | None, ranks: Ranks) -> dict[str, Path]:
    """Both models, by name: the folders of their weights."""
    _step("train the control: the same backbone, no defence, clean images")
    control = run_stage(StageRun(recipe.control, recipe.control_model, out / CONTROL / "train", None), dataset, device, ranks)
    start: Path | None = None
    for stage in ("pretrain", "train", "finetune"):
        _step(f"{stage} {DEFENDED}")
        part_s = None if budget_s is None else recipe.shares().seconds(budget_s)[stage]
        start = run_stage(StageRun(getattr(recipe, stage), recipe.model, out / DEFENDED / stage, start, part_s), dataset, device, ranks)
    assert start is not None
    return {CONTROL: control, DEFENDED: start}


def _step(what: str) -> None:
    print(f"\n== {what}", flush=True)
