"""Fetching and checking published backbone weights: safetensors only, never a pickle."""

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from amsdn.errors import InputError
from amsdn.models.hub import HubError, fetch

FILENAME = "model.safetensors"


def pretrained_weights(name: str, source: bool | str) -> dict[str, Tensor]:
    """The state dict for timm's network ``name``: from the file ``source``, or with True from the hub or its cache.

    Raises InputError, in one line, where there is no file, no network, or the tensors are not this network's.
    """
    path = _from_hub(name) if source is True else Path(str(source))
    return _read(name, path)


def _read(name: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; pretrained must be True, False or the path of timm's {FILENAME} for {name}")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: pretrained weights must be a .safetensors file (pickles are never opened); download timm's {FILENAME}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a readable safetensors file ({e}); download timm's {FILENAME} for {name} again") from e
    _check_fits(name, state, path)
    return state


def _check_fits(name: str, state: dict[str, Tensor], path: Path) -> None:
    """Every tensor outside the classifier must be there and have its shape; timm itself would skip missing ones in silence."""
    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    head = str(getattr(get_pretrained_cfg(name), "classifier", None) or "head").split(".")[0] + "."
    wrong = [k for k, v in expected.items() if not k.startswith(head) and (k not in state or state[k].shape != v.shape)]
    if wrong:
        raise InputError(f"{path}: does not hold the weights of {name} ({len(wrong)} tensors missing or mis-shaped, first {wrong[0]!r})")


def _from_hub(name: str) -> Path:
    """timm's file for ``name`` from the hub's cache, else downloaded; never waits long for a network that is not there."""
    config = get_pretrained_cfg(name)
    repo = getattr(config, "hf_hub_id", None)
    if config is None or not repo:
        raise InputError(f"{name}: timm publishes no weights for it; use pretrained=False or a path to a {FILENAME}")
    try:
        return fetch(repo, FILENAME)
    except HubError as e:
        raise InputError(
            f"pretrained=True: cannot download https://huggingface.co/{repo}/resolve/main/{FILENAME} ({e}); fetch that file "
            f'elsewhere and pass pretrained="/path/{FILENAME}", or use pretrained=False'
        ) from e
