"""``amsdn evaluate``: clean and robust accuracy of any classifier, into a run folder that ``amsdn report`` reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amsdn.commands.common import check_classes, open_data, open_model
from amsdn.commands.measuring import Measured, choose, fitting, measure
from amsdn.commands.options import parse, positive, recipe_help, split_recipe
from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.report import terminal_table
from amsdn.recipes import Recipe
from amsdn.utils.helpers import pick_device


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``amsdn evaluate``."""

    model: str  # a model folder, or module:function that returns a torch classifier
    data: str  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path  # the run folder
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    samples: int | None = None  # how many test images to attack; default: all
    attacks: tuple[str, ...] = ()  # names from the recipe's suite; default: all of it
    evaluate: EvaluateConfig = EvaluateConfig()
    device: str = "auto"  # auto, cpu or cuda


def run(args: Sequence[str]) -> None:
    """Evaluate one model."""
    recipe, rest = split_recipe(args)
    description = f"Attack a classifier and write one row per image and attack.\n\nExample: amsdn evaluate {recipe.name} --limit 50\n\n{recipe_help()}"
    options = parse(_defaults(recipe), rest, f"evaluate {recipe.name}", description)
    positive(options.samples, "--samples")
    attacks = choose(recipe.attacks, options.attacks)
    device = pick_device(options.device)
    model = open_model(options.model, device)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    check_classes(model, dataset, options.model)
    if not options.attacks:
        attacks = fitting(attacks, model)
    measure(Measured(model, options.model, dataset, options.out, device), attacks, options.evaluate, options.samples, recipe.headline)
    print(terminal_table({"this model": options.out}))
    print(f"rows: {options.out / 'eval.jsonl'}\nreport: amsdn report {options.out}")


def _defaults(recipe: Recipe) -> EvaluateOptions:
    root = Path("checkpoints") / recipe.name
    return EvaluateOptions(
        model=str(root / "finetune" / "model"), data=recipe.data, out=root / "evaluation", samples=recipe.samples, evaluate=recipe.evaluate
    )
