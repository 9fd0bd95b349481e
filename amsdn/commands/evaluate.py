"""``amsdn evaluate``: clean and robust accuracy of any classifier, into a run folder that ``amsdn report`` reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amsdn.commands.common import check_classes, default_model, open_data, open_model
from amsdn.commands.measuring import Measured, choose, fitting, measure
from amsdn.commands.options import parse, positive, recipe_help, split_recipe
from amsdn.commands.ranks import Workers
from amsdn.evaluation.evaluate import RECORDS, EvaluateConfig
from amsdn.evaluation.report import terminal_table
from amsdn.evaluation.shards import Shard
from amsdn.recipes import Recipe
from amsdn.utils.helpers import pick_device


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``amsdn evaluate``."""

    data: str  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path  # the run folder
    model: str | None = None  # a model folder, a shipped model's name, or module:function that returns a torch classifier
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    samples: int | None = None  # how many test images to attack; default: all
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
    attacks = choose(recipe.attacks, options.attacks)
    device = pick_device(options.device)
    name = options.model or default_model(recipe.name)
    model = open_model(name, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, name)
    if not options.attacks:
        attacks = fitting(attacks, model)
    measured = Measured(model, name, dataset, options.out, device)
    for shard in shards:
        measure(measured, attacks, options.evaluate, options.samples, recipe.headline, shard=shard, progress=workers.first)
        if shard.whole:
            print(terminal_table({"this model": options.out}))
            print(f"model: {name}\nrows: {options.out / RECORDS}\nreport: amsdn report {options.out}")
        elif workers.count == 1:
            print(f"shard {shard} is done; when all are, the same command without --shard puts them together")


def _defaults(recipe: Recipe) -> EvaluateOptions:
    out = Path("checkpoints") / recipe.name / "evaluation"
    return EvaluateOptions(data=recipe.data, out=out, samples=recipe.samples, evaluate=recipe.evaluate)
