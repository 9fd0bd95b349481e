"""The three training commands; each is this one with another stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from amsdn.commands.common import open_data
from amsdn.commands.options import parse, recipe_help, split_recipe
from amsdn.commands.stages import StageConfig, StageRun, run_stage
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes import Recipe
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.pretrain_ssrt import PretrainConfig
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
    device = pick_device(options.device)
    start = _start(options.init, options.out, previous)
    dataset = open_data(options.data, options.data_root, options.limit, device, options.image_size)
    stage: StageConfig = options.stage
    model = run_stage(StageRun(stage, options.model, options.out / name, start), dataset, device)
    print(f"model: {model}")


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
