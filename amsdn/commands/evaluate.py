"""``amsdn evaluate``: clean and robust accuracy of any classifier, into a run folder that ``amsdn report`` reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from amsdn.commands.common import check_classes, default_model, open_data, open_model
from amsdn.commands.evaluation_plan import Plan, refuse_changes
from amsdn.commands.measuring import Measured, choose, fitting
from amsdn.commands.options import parse, positive, recipe_help, split_recipe
from amsdn.commands.ranks import Workers
from amsdn.evaluation.evaluate import RECORDS, EvaluateConfig
from amsdn.evaluation.protocol import Protocol
from amsdn.evaluation.report import terminal_table
from amsdn.evaluation.shards import Shard
from amsdn.recipes import Recipe
from amsdn.utils.helpers import pick_device


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``amsdn evaluate``."""

    data: str  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path  # the run folder
    # A model folder, a shipped model's name, timm:NAME, timm:NAME@FILE.safetensors, FILE.onnx, or module:function that returns a torch
    # classifier. timm's normalisation is put inside, or :mean=R,G,B:std=R,G,B at the end; an ONNX file must hold its own.
    model: str | None = None
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    protocol: Literal["quick", "standard", "full"] | None = (
        None  # fixed attacks, budgets, images and seed instead of the recipe's, and checks
    )
    samples: int | None = None  # how many test images to attack; default: as many as the recipe says
    attacks: tuple[str, ...] = ()  # names from the recipe's suite; default: all of it
    shard: str = "1/1"  # i/n: attack every n-th batch from the i-th; when all n are done, run once more without it
    evaluate: EvaluateConfig = EvaluateConfig()
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Evaluate one model."""
    recipe, rest = split_recipe(args)
    description = f"Attack a classifier and write one row per image and attack.\n\nExample: amsdn evaluate {recipe.name} --limit 50\n\n{recipe_help()}"
    options = parse(_defaults(recipe), rest, f"evaluate {recipe.name}", description)
    positive(options.samples, "--samples")
    workers = Workers.of_environment()
    shards = workers.shards(Shard.parse(options.shard))
    choose(recipe.attacks, options.attacks)
    device = pick_device(options.device)
    name = options.model or default_model(recipe.name)
    model = open_model(name, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, name)
    measured = Measured(model, name, dataset, options.out, device)
    plan = _plan(options, recipe, measured)
    if workers.first and plan.protocol is not None:
        print(plan.announcement(measured), flush=True)
    for shard in shards:
        plan.carry_out(measured, shard, progress=workers.first)
        if shard.whole:
            print(terminal_table({"this model": options.out}))
            print(f"model: {name}\nrows: {options.out / RECORDS}\nreport: amsdn report {options.out}")
        elif workers.count == 1:
            print(f"shard {shard} is done; when all are, the same command without --shard puts them together")


def _plan(options: EvaluateOptions, recipe: Recipe, run: Measured) -> Plan:
    """The protocol that was asked for, else the recipe's suite or the attacks chosen from it."""
    if options.protocol is None:
        chosen = choose(recipe.attacks, options.attacks)
        attacks = chosen if options.attacks else fitting(chosen, run.model)
        return Plan(attacks, options.evaluate, options.samples or recipe.samples, recipe.headline)
    changed = {
        "--attacks": bool(options.attacks),
        "--samples": options.samples is not None,
        "--evaluate": options.evaluate != recipe.evaluate,
    }
    refuse_changes(options.protocol, changed)
    return Plan.of_protocol(Protocol.named(options.protocol, run.dataset.image_size), run)


def _defaults(recipe: Recipe) -> EvaluateOptions:
    out = Path("checkpoints") / recipe.name / "evaluation"
    return EvaluateOptions(data=recipe.data, out=out, evaluate=recipe.evaluate)
