"""Models on disk: ``config.json`` and ``model.safetensors`` in one folder, the layout of the Hugging Face hub.

Nothing here unpickles: a folder that only holds pickled weights is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.models.hub import HubError, fetch
from amsdn.models.shipped import locate, shipped_models
from amsdn.records import write_atomic, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLES = (".pt", ".pth", ".pkl", ".bin", ".ckpt")


def save_model(model: AMSDN, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write ``model`` to ``folder``, each file whole or not at all; the configuration comes last and completes the folder.

    ``dtype`` (for instance torch.bfloat16) rounds the parameters; buffers, among them the detection threshold and the batch
    norm statistics, keep their precision. Raises InputError where the folder cannot be written.
    """
    folder = Path(folder)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        kept = tensor.to(dtype) if dtype is not None and name in parameters else tensor
        tensors[name] = kept.detach().cpu().contiguous()
    try:
        write_atomic(folder / WEIGHTS, save(tensors))
        write_json(folder / CONFIG, model.saved_config())
    except OSError as e:
        raise InputError(f"{folder}: cannot write the model ({e.strerror}); choose a folder with write access and free space") from e


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> AMSDN:
    """The model in ``folder``, or the shipped one of that name, or that of the hub's repository, on ``device`` in eval mode and float32.

    Raises InputError, in one line, for a folder or repository that is missing, incomplete, damaged, or of another model.
    """
    path = locate(folder)
    if not path.exists() and len(path.parts) == 2 and not path.is_absolute():
        path = _from_hub(str(folder))
    config = _read_config(path)
    model = AMSDN.from_config(config)
    fill(model, read_weights(path / WEIGHTS), path / WEIGHTS, f"{CONFIG} beside it describes another model")
    return model.to(device).eval()


def _from_hub(repo: str) -> Path:
    try:
        return [fetch(repo, name) for name in (WEIGHTS, CONFIG)][-1].parent
    except HubError as e:
        raise InputError(f"{repo}: no such folder, and the hub gave no such model ({e}); check the path") from e


def _read_config(folder: Path) -> AMSDNConfig:
    if not folder.is_dir():
        known = ", ".join(shipped_models()) or "there are none in this installation"
        raise InputError(f"{folder}: no such folder; give one that holds {CONFIG} and {WEIGHTS}, or the name of a shipped model: {known}")
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        hint = f"; {pickles[0]} may be a pickle, which is never opened" if pickles else ""
        missing = CONFIG if not path.is_file() else WEIGHTS
        raise InputError(f"{folder}: holds no {missing}{hint}; give a folder written by save_model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not readable as JSON ({str(e).splitlines()[0]}); save the model again") from e
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold one JSON object, holds a {type(values).__name__}; save the model again")
    unknown = sorted(set(values) - {f.name for f in fields(AMSDNConfig)})
    if unknown:
        raise InputError(f"{path}: unknown field {unknown[0]!r}; it is not an AMSDN of this version")
    return _typed_config(values, path)


def _typed_config(values: dict[str, Any], path: Path) -> AMSDNConfig:
    for name in ("mean", "std"):
        if name in values:
            values[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    for f in fields(AMSDNConfig):
        if f.name in values and not _has_type(values[f.name], f.default):
            raise InputError(f"{path}: field {f.name!r} cannot be {values[f.name]!r}; save the model again")
    return AMSDNConfig(**(values | {"pretrained": False}))  # the weights lie beside it: never download others


def _has_type(value: Any, default: Any) -> bool:
    """Whether a JSON value can stand where ``default`` stands (None stands for an optional integer)."""
    if default is None:
        return value is None or type(value) is int
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(type(v) in (int, float) for v in value)
    if type(default) is float:
        return type(value) in (int, float)
    return type(value) is type(default) or (isinstance(default, bool) and isinstance(value, str))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; raises InputError where it is missing, damaged, or of another kind."""
    try:
        return load(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path") from e
    except (SafetensorError, ValueError) as e:
        raise InputError(f"{path}: damaged or not a safetensors file ({str(e).splitlines()[0]}); copy or save it again") from e


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, remedy: str) -> None:
    """Copy ``tensors`` of the file ``path`` into ``model``; raises InputError, ending in ``remedy``, unless names and shapes are exactly its own."""
    expected = model.state_dict()
    for problem, names in (("lacks", expected.keys() - tensors.keys()), ("has unexpected", tensors.keys() - expected.keys())):
        if names:
            raise InputError(f"{path}: {problem} tensor {min(names)!r} ({len(names)} in all); {remedy}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{path}: {name!r} has shape {list(tensor.shape)}, needs {list(expected[name].shape)}; {remedy}")
    model.load_state_dict(tensors)
