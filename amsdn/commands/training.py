"""The three training commands; each is this one with another stage."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from amsdn.commands.common import open_data
from amsdn.commands.options import parse, recipe_help, split_recipe
from amsdn.commands.stages import StageConfig, StageRun, run_stage
from amsdn.data import Dataset
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes import Recipe
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.budget import parse_budget
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.pretrain_ssrt import PretrainConfig
from amsdn.training.ranks import joined
from amsdn.utils.helpers import pick_device


@dataclass(frozen=True)
class _Common:
    data: str  # digits, cifar10, folder:DIR or arrays:DIR
    out: Path  # the run's folder; the stage writes to OUT/STAGE
    data_root: Path | None = None  # where cifar10 lies (or AMSDN_DATA)
    limit: int | None = None  # use at most this many images of every split
    image_size: int | None = None  # pixels a side; default: the data set's own
    init: str = "auto"  # a model folder to start from; auto: the stage before, if it has run; none: fresh weights
    device: str = "auto"  # auto, cpu or cuda
    # Time for this stage's training, such as 90s, 10min or 1.5h, instead of epochs; none: no limit. Default: its share of the recipe's.
    budget: str | None = None


@dataclass(frozen=True)
class _Options(_Common):
    model: AMSDNConfig = AMSDNConfig()


@dataclass(frozen=True)
class PretrainOptions(_Options):
    stage: Annotated[PretrainConfig, tyro.conf.arg(name="")] = PretrainConfig()


@dataclass(frozen=True)
class TrainOptions(_Options):
    stage: Annotated[AdversarialTrainConfig, tyro.conf.arg(name="")] = AdversarialTrainConfig()


@dataclass(frozen=True)
class FinetuneOptions(_Options):
    stage: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = FinetuneConfig()


Options = PretrainOptions | TrainOptions | FinetuneOptions


def run_command(name: str, previous: str | None, options_of: Callable[[Recipe, Path], Options], args: Sequence[str], about: str) -> None:
    """Parse, find the weights to start from, run the stage, say where the model is."""
    recipe, rest = split_recipe(args)
    description = f"{about}\n\nExample: amsdn {name} {recipe.name} --loop.epochs 2 --limit 200\n\n{recipe_help()}"
    options = parse(options_of(recipe, Path("checkpoints") / recipe.name), rest, f"{name} {recipe.name}", description)
    budget_s = _budget(options.budget, rest, recipe, name)
    device = pick_device(options.device)
    start = _start(options.init, options.out, previous)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    _check_asked_classes(rest, options.model, dataset)
    stage: StageConfig = options.stage
    with joined(device) as ranks:
        model = run_stage(StageRun(stage, options.model, options.out / name, start, budget_s), dataset, device, ranks)
        if ranks.first:
            print(f"model: {model}")


def _budget(given: str | None, words: Sequence[str], recipe: Recipe, stage: str) -> float | None:
    """Seconds for the stage; None where epochs decide. Raises InputError for what is no time, and for a budget and epochs at once."""
    epochs = any(re.match(r"--loop[.]epochs(=|$)", word) for word in words)
    if given is not None and given.lower() != "none":
        if epochs:
            raise InputError(f"--budget {given}: it decides the epochs, so give it or --loop.epochs, not both")
        return parse_budget(given)
    if given is not None or epochs or recipe.budget is None:
        return None
    return recipe.shares().seconds(parse_budget(recipe.budget))[stage]


def _check_asked_classes(words: Sequence[str], model: AMSDNConfig, dataset: Dataset) -> None:
    """Raise InputError where the user asked for another number of classes than the data has; a recipe's number gives way."""
    asked = any(re.match(r"--model[.]num[-_]classes(=|$)", word) for word in words)
    if asked and model.num_classes != (found := len(dataset.classes)):
        raise InputError(f"--model.num-classes {model.num_classes}: {dataset.name} has {found} classes; leave it out, or give {found}")


def _start(init: str, out: Path, previous: str | None) -> Path | None:
    if init == "none" or (init == "auto" and previous is None):
        return None
    if init != "auto":
        return Path(init)
    folder = out / str(previous) / "model"
    if folder.exists():
        return folder
    if previous == "train":
        raise InputError(f"{folder}: no trained model to fine-tune; run amsdn train first, or name one with --init DIR")
    return None
