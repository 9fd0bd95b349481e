"""Fetching and checking published backbone weights: safetensors only, never a pickle."""

import logging
from pathlib import Path

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from amsdn.errors import InputError

TIMEOUT_S = 5.0
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
    # timm writes "timm/" and leaves the repository's name to be that of the network and its training tag.
    repo = f"{repo}{name}.{config.tag}" if repo.endswith("/") else repo
    cached = try_to_load_from_cache(repo, FILENAME)
    if isinstance(cached, str):
        return Path(cached)
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)
    try:
        # One short probe first: the download itself retries for half a minute when there is no network.
        get_hf_file_metadata(hf_hub_url(repo, FILENAME), timeout=TIMEOUT_S)
        return Path(hf_hub_download(repo, FILENAME, etag_timeout=TIMEOUT_S))
    except Exception as e:  # the hub's client raises its own, its transport's and the system's errors
        raise InputError(
            f"pretrained=True: cannot download https://huggingface.co/{repo}/resolve/main/{FILENAME} ({type(e).__name__}); fetch that file "
            f'elsewhere and pass pretrained="/path/{FILENAME}", or use pretrained=False'
        ) from e
    finally:
        hub_log.setLevel(level)
