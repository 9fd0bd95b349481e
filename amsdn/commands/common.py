"""What the commands share: opening data and models, and saying where a result came from."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amsdn.commands.model_sources import FORMS, open_source
from amsdn.data import Dataset, load_dataset
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.models.onnx_model import OnnxModel
from amsdn.models.shipped import locate, shipped_models
from amsdn.models.storage import CONFIG
from amsdn.models.timm_model import TimmModel
from amsdn.protocols import is_black_box
from amsdn.records import canonical, write_json
from amsdn.utils.helpers import command_line, commit, hardware, versions

ABOUT_FILE = "about.json"  # beside the weights: what the classes are called and how large the images were


def open_data(name: str, root: Path | None, limit: int | None, device: torch.device, image_size: int | None = None) -> Dataset:
    """The data set that ``--data``, ``--data-root`` and ``--limit`` name, on the device."""
    if limit is not None and limit < 2:
        raise InputError(f"--limit must be at least 2, got {limit}")
    return load_dataset(name, root=root, limit=limit, image_size=image_size).to(device)


def open_model(model: str, device: torch.device) -> nn.Module:
    """``--model``, in any of the forms of ``amsdn.commands.model_sources``, in eval mode on the device."""
    return open_source(model, device).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def default_model(recipe: str, instead: str | None = None) -> str:
    """The model that a command uses where none is named: the recipe's last trained stage, else the shipped model of its name or ``instead``.

    Pretraining alone is not enough: it sees no labels. Raises InputError where there is neither.
    """
    shipped = recipe if instead is None else instead
    found = [folder for stage in ("finetune", "train") if ((folder := Path("checkpoints") / recipe / stage / "model") / CONFIG).exists()]
    if not found and shipped not in shipped_models():
        raise InputError(
            f"checkpoints/{recipe}: no trained model; run amsdn train {recipe}, or name one with --model: "
            f"{FORMS}; shipped: {', '.join(shipped_models())}"
        )
    return str(found[0]) if found else shipped


def find_class(named: str, classes: Sequence[str], also: Sequence[str] = ()) -> int:
    """The index of a class given by name or by index; raises InputError, naming what else may be given, for one that is not there."""
    if named in classes:
        return list(classes).index(named)
    if named.isdecimal() and int(named) < len(classes):
        return int(named)
    raise InputError(f"--target {named}: no such class; choose one of {', '.join([*also, *classes])}")


def check_classes(model: nn.Module, dataset: Dataset, where: str) -> None:
    """Raise InputError if the model says that it was made for another number of classes than the data has."""
    classes = model.config.num_classes if isinstance(model, AMSDN) else getattr(model, "num_classes", None)
    if isinstance(model, AMSDN | TimmModel | OnnxModel) and classes not in (None, len(dataset.classes)):
        raise InputError(
            f"{where}: tells {classes} classes apart, but {dataset.name} has {len(dataset.classes)}; use the data it was trained on"
        )


def write_about(folder: Path, dataset: Dataset) -> None:
    """Keep beside the weights what predictions are called."""
    write_json(folder / ABOUT_FILE, {"data": dataset.name, "classes": list(dataset.classes), "image_size": dataset.image_size})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises InputError where it is missing or broken."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: missing or not JSON ({type(e).__name__}); make it again with the amsdn command that writes it") from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, not a JSON object; make it again with the amsdn command that writes it")
    return value


def read_about(folder: Path | str) -> tuple[list[str], int]:
    """The class names and the image size that ``write_about`` kept; raises InputError where they are missing or broken."""
    folder = locate(folder)
    about = read_json(folder / ABOUT_FILE)
    try:
        return [str(c) for c in about["classes"]], int(about["image_size"])
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(
            f"{folder / ABOUT_FILE}: lacks class names or image size; use a model folder that an amsdn training stage wrote"
        ) from e


def provenance(device: torch.device, **more: Any) -> dict[str, Any]:
    """Command, commit, time, versions and machine, with whatever else the caller adds."""
    return {
        "command": command_line(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(device),
        **more,
    }


def describe_model(model: nn.Module, fingerprint: str) -> dict[str, Any]:
    """The model's part of run.json."""
    config = canonical(model.config) if isinstance(model, AMSDN | TimmModel) else {"class": type(model).__name__}
    described: dict[str, Any] = {
        "config": config,
        "parameters": None if is_black_box(model) else sum(p.numel() for p in model.parameters()),
        "fingerprint": fingerprint,
        "detection_threshold": None,
        "false_positive_rate": None,
    }
    if isinstance(model, AMSDN) and model.has_detector:
        described["detection_threshold"] = float(model.detection_threshold)
        described["false_positive_rate"] = float(model.false_positive_rate)
    return described


def describe_data(dataset: Dataset, samples: int) -> dict[str, Any]:
    """The data's part of run.json."""
    return {"name": dataset.name, "split": "test", "samples": samples, "classes": list(dataset.classes), "image_size": dataset.image_size}
