"""What ``--model`` may name, and how each is opened.

- ``DIR`` or a shipped model's name: a model of ours,
- ``timm:NAME``: a network of timm's with its published weights; ``timm:NAME@FILE.safetensors``: with weights of your own. timm's
  normalisation is put inside; ``:mean=R,G,B`` and ``:std=R,G,B`` at the end put another there,
- ``FILE.onnx``: a network in the ONNX format, which must normalise by itself and gives no gradients,
- ``module:function``: any ``torch.nn.Module`` that the function, called without arguments, returns.

A folder or file that exists comes first. Nothing is ever unpickled.
"""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from amsdn.errors import InputError
from amsdn.models.onnx_model import OnnxModel
from amsdn.models.storage import PICKLES, load_model
from amsdn.models.timm_model import load_timm

FORMS = "a model folder, a shipped model's name, timm:NAME, timm:NAME@FILE.safetensors, FILE.onnx or module:function"
TIMM = "timm:"


def open_source(model: str, device: torch.device) -> nn.Module:
    """The classifier that ``--model`` names, in eval mode; one of ours on ``device``. Raises InputError where it cannot be had."""
    path = Path(model)
    if path.is_file():
        return _open_file(path)
    if path.exists():
        return load_model(model, device)
    if model.startswith(TIMM):
        spec = TimmSpec.parse(model)
        return load_timm(spec.name, spec.weights, mean=spec.mean, std=spec.std)
    if path.suffix == ".onnx":
        return OnnxModel(path)  # which says that it is not there
    return _call_factory(model).eval() if ":" in model else load_model(model, device)


@dataclass(frozen=True)
class TimmSpec:
    """``timm:NAME[@FILE.safetensors][:mean=R,G,B][:std=R,G,B]``, taken apart."""

    name: str
    weights: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, text: str) -> "TimmSpec":
        """Raises InputError for a text without a name, or with settings that are none."""
        source, *settings = re.split(r":(?=[^:/]*=)", text.removeprefix(TIMM))
        name, at, weights = source.partition("@")
        if not name or (at and not weights):
            raise InputError(f"--model {text}: names no {'file' if name else 'network'}; write timm:NAME or timm:NAME@FILE.safetensors")
        given = dict(setting.split("=", 1) for setting in settings)
        if unknown := sorted(given.keys() - {"mean", "std"}):
            raise InputError(f"--model {text}: unknown setting {unknown[0]!r}; there are :mean=R,G,B and :std=R,G,B")
        mean, std = (_numbers(given.get(key), key, text) for key in ("mean", "std"))
        return cls(name, Path(weights) if at else None, mean, std)


def _numbers(given: str | None, key: str, text: str) -> tuple[float, ...] | None:
    """Three numbers in [0,1] with commas between them; None where nothing is given."""
    if given is None:
        return None
    try:
        red, green, blue = (float(word) for word in given.split(","))
        if not all(0 <= value <= 1 for value in (red, green, blue)):
            raise ValueError("out of range")
    except ValueError as e:
        raise InputError(f"--model {text}: {key} must be three numbers in [0,1], such as {key}=0.49,0.48,0.45; got {given!r}") from e
    return red, green, blue


def _open_file(path: Path) -> nn.Module:
    if path.suffix == ".onnx":
        return OnnxModel(path)
    if path.suffix in PICKLES:
        raise InputError(
            f"--model {path}: may be a pickle, which is never opened; convert it to safetensors and give timm:NAME@FILE.safetensors, or "
            "give module:function that builds the network"
        )
    hint = f"does not say of which network its weights are; give timm:NAME@{path}" if path.suffix == ".safetensors" else "cannot be used"
    raise InputError(f"--model {path}: {hint}; it may be {FORMS}")


def _call_factory(spec: str) -> nn.Module:
    module_name, _, function_name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), function_name)()
    except Exception as e:  # it is the user's code: it may raise anything
        raise InputError(
            f"--model {spec}: cannot call it ({type(e).__name__}: {e}); give a model folder, or module:function taking no arguments"
        ) from e
    finally:
        sys.path.pop(0)
    if not isinstance(made, nn.Module):
        raise InputError(f"--model {spec}: returned {type(made).__name__}; it must return a torch.nn.Module")
    return made
