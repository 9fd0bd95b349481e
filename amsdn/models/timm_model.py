"""A classifier of timm's as the rest of the package wants it: images in [0,1] in, normalisation inside.

Weights are timm's published ones, from the hub or its cache, or a safetensors file of the reader's own. Pickles are never opened.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.models.hub import HubError, fetch
from amsdn.models.normalize import Normalize
from amsdn.models.storage import PICKLES, fill, read_weights

WEIGHTS = "model.safetensors"  # what timm's repositories on the hub hold


@dataclass(frozen=True)
class TimmConfig:
    """Which network of timm's it is, and what it is shown."""

    name: str  # timm's, with the tag of its weights where one was given
    num_classes: int
    mean: tuple[float, ...]  # of the normalisation, in [0,1] pixel units
    std: tuple[float, ...]


class TimmModel(nn.Module):
    """images [B,3,H,W] in [0,1] -> logits [B,K] of ``network`` on normalised images.

    ``side``: the (height, width) that the network is built for, where it takes no other; its forward then raises InputError for another.
    """

    def __init__(self, network: nn.Module, config: TimmConfig, side: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.config, self.side = config, side
        self.normalize = Normalize(config.mean, config.std)
        self.network = network

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None and tuple(x.shape[2:]) != self.side:
            (height, width), found = self.side, "x".join(map(str, x.shape[2:]))
            raise InputError(f"timm:{self.config.name}: takes images of {height}x{width}, got {found}; pass --image-size {height}")
        logits: Tensor = self.network(self.normalize(x))
        return logits


def load_timm(
    name: str, weights: Path | str | None = None, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> TimmModel:
    """timm's network ``name`` in eval mode, with its published weights, or with those of the safetensors file ``weights``.

    A name may carry the tag of its weights (``resnet18.a1_in1k``). How many classes a file tells apart is read from its
    classifier. ``mean`` and ``std`` [3] replace those that timm gives for the network. Raises InputError, in one line, for an
    unknown name, for weights that are missing, damaged, pickled or another network's, and without a network to fetch them by.
    """
    published = _published(name)
    network = _with_published(name, published) if weights is None else _with_file(name, published, Path(weights))
    shown: Any = resolve_model_data_config(network)
    classes: Any = network.num_classes
    config = TimmConfig(name, int(classes), tuple(mean or shown["mean"]), tuple(std or shown["std"]))
    side = tuple(shown["input_size"][1:]) if getattr(published, "fixed_input_size", False) else None
    return TimmModel(network, config, side).eval()


def _published(name: str) -> Any:
    """What timm says about its weights of that name. Raises InputError where it knows no such network or weights."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}" if near else "timm.list_models() has all names"
        raise InputError(f"timm:{name}: timm {timm.__version__} has no such network; {hint}")
    try:
        published = get_pretrained_cfg(name)
    except RuntimeError as e:
        known = ", ".join(timm.list_models(f"{name.split('.')[0]}.*", pretrained=True))
        raise InputError(f"timm:{name}: timm has no such weights; known: {known}") from e
    if published is None or published.input_size[0] != 3:
        raise InputError(f"timm:{name}: takes no RGB images; choose a network of three channels")
    return published


def _with_published(name: str, published: Any) -> nn.Module:
    instead = f"give a file of your own: timm:{name}@FILE.safetensors"
    if not published.hf_hub_id or not published.num_classes:
        raise InputError(f"timm:{name}: timm publishes no weights of a classifier for it on the hub; {instead}")
    try:
        path = fetch(published.hf_hub_id, WEIGHTS)
    except HubError as e:
        raise InputError(
            f"timm:{name}: cannot fetch {WEIGHTS} of {published.hf_hub_id} from the hub ({e}); check the connection, or {instead}"
        ) from e
    overlay = {"state_dict": read_weights(path), "custom_load": False}  # timm translates older names of tensors
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as e:
        raise InputError(f"{path}: does not hold timm's weights of {name} ({' '.join(str(e).split())[:200]}); fetch it again") from e


def _with_file(name: str, published: Any, path: Path) -> nn.Module:
    if path.suffix != ".safetensors":
        what = "may be a pickle, which is never opened" if path.suffix in PICKLES else "is no safetensors file"
        raise InputError(f"{path}: {what}; convert it: safetensors.torch.save_file(state_dict, 'FILE.safetensors')")
    tensors = read_weights(path)
    network = timm.create_model(name, pretrained=False, num_classes=_classes(name, published.classifier, tensors, path))
    fill(network, tensors, path, f"it must be the state dict of timm's {name}")
    return network


def _classes(name: str, classifier: str | Sequence[str] | None, tensors: Mapping[str, Tensor], path: Path) -> int:
    """How many classes the file's classifier tells apart; some networks have several classifiers, all of one size."""
    if not classifier:
        raise InputError(f"timm:{name}: timm does not say which of its layers classifies; build it in a function: module:function")
    weight = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if weight not in tensors:
        found = f"its first is {min(tensors)!r}" if tensors else "it holds none"
        raise InputError(
            f"{path}: lacks tensor {weight!r}, whose rows are the classes ({found}); it must be the state dict of timm's {name}"
        )
    return len(tensors[weight])
