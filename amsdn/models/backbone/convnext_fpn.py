"""ConvNeXt features (Liu et al. 2022, through timm) and the feature pyramid (Lin et al. 2017, through torchvision).

``build_backbone`` is the one door to every backbone; ``FeaturePyramid`` sits on any of them.
``python -m amsdn.models.backbone.convnext_fpn`` prints shapes and parameter counts.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from amsdn.errors import InputError
from amsdn.models.backbone.compact import CompactBackbone
from amsdn.models.backbone.interface import Backbone
from amsdn.models.backbone.preact_resnet import PreActBackbone
from amsdn.models.backbone.pretrained import pretrained_weights

CONVNEXT = {"tiny": "convnext_tiny", "nano": "convnext_nano", "pico": "convnext_pico", "atto": "convnext_atto"}
SMALL = {"compact": 2, "preact18": 1}  # networks of our own and their first level's stride
VARIANTS = (*SMALL, *CONVNEXT)
LAYER_SCALE = 1e-2  # timm's 1e-6 is for schedules of hundreds of epochs; ours are short


def build_backbone(
    variant: str = "tiny",
    *,
    pretrained: bool | str = False,
    stem_stride: int | None = None,
    width: int = 32,
    drop_path: float = 0.0,
) -> Backbone:
    """A four-level backbone by name.

    ``variant``: compact, preact18, tiny, nano, pico, atto, or ``timm:NAME`` for any timm network with feature maps at
    four strides s, 2s, 4s, 8s. ``pretrained``: False, True (timm's ImageNet weights, from the hub or its cache), or the
    path of a safetensors file of timm's form. ``stem_stride``: 4 is ConvNeXt's own stem; 2 or 1 replace it by two 3x3
    convolutions, for images of 32 px, and keep all other pretrained weights; None is the network's own. ``width`` is the
    compact network's. ``drop_path`` in [0,1) is ConvNeXt's; at most 0.05 for short schedules. Raises InputError.
    """
    if variant in SMALL:
        return _build_small(variant, pretrained, stem_stride, width, drop_path)
    if variant not in CONVNEXT and not variant.startswith("timm:"):
        raise InputError(f"variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)} or timm:NAME")
    if not 0 <= drop_path < 1:
        raise InputError(f"drop_path must lie in [0, 1), got {drop_path}; 0.05 is plenty for a short schedule")
    return TimmBackbone(CONVNEXT.get(variant, variant.removeprefix("timm:")), pretrained, stem_stride, drop_path)


def _build_small(variant: str, pretrained: bool | str, stem_stride: int | None, width: int, drop_path: float) -> Backbone:
    if pretrained:
        raise InputError(f"variant {variant!r} has no published weights; use pretrained=False, or a ConvNeXt ({', '.join(CONVNEXT)})")
    if stem_stride not in (None, SMALL[variant]):
        raise InputError(f"variant {variant!r} has stem_stride {SMALL[variant]}, not {stem_stride}; leave it out, or choose a ConvNeXt")
    if drop_path:
        raise InputError(f"variant {variant!r} has no drop_path; leave it at 0, or choose a ConvNeXt ({', '.join(CONVNEXT)})")
    if width < 1:
        raise InputError(f"width must be at least 1, got {width}; 32 is the default")
    return CompactBackbone(width) if variant == "compact" else PreActBackbone()


class TimmBackbone(Backbone):
    """The last four feature levels of a timm network, with ConvNeXt's stem exchangeable."""

    def __init__(self, name: str, pretrained: bool | str, stem_stride: int | None, drop_path: float) -> None:
        super().__init__()
        self.network: Any
        is_convnext = name.startswith("convnext")
        if stem_stride is not None and stem_stride not in (1, 2, 4):
            raise InputError(f"stem_stride must be 1, 2 or 4, got {stem_stride}; 2 suits images of 32 px")
        if stem_stride is not None and not is_convnext:
            raise InputError(f"timm:{name}: stem_stride applies to ConvNeXt only; leave it out")
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        if name in CONVNEXT.values() and not pretrained:
            options["ls_init_value"] = LAYER_SCALE
        if pretrained:
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": pretrained_weights(name, pretrained)}}
        self.network = _timm_features(name, options)
        self.channels = list(self.network.feature_info.channels())
        self.strides = list(self.network.feature_info.reduction())
        if stem_stride not in (None, self.strides[0]):
            assert stem_stride is not None
            _replace_stem(self.network, stem_stride, name)
            self.strides = [stem_stride * 2**i for i in range(4)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.network(x))


def _timm_features(name: str, options: dict[str, Any]) -> Any:
    """timm's network with its last four levels as outputs, or one InputError that says why it cannot serve."""
    remedy = f"choose one of {', '.join(VARIANTS)} or a convolutional timm network"
    if not timm.is_model(name):
        raise InputError(f"timm:{name}: timm {timm.__version__} has no such network; {remedy}")
    try:
        network: Any = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), **options)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, IndexError) as e:
        raise InputError(f"timm:{name}: cannot serve as a four-level backbone ({str(e).splitlines()[0]}); {remedy}") from e
    strides = list(network.feature_info.reduction())
    if len(strides) != 4 or any(b != 2 * a for a, b in pairwise(strides)):
        raise InputError(f"timm:{name}: needs four levels whose strides double, has strides {strides}; {remedy}")
    return network


def _replace_stem(network: Any, stride: int, name: str) -> None:
    """Put 3x3/s1 - norm - GELU - 3x3/stride in the place of the 4x4/s4 convolution; the norm after it stays."""
    names = [n for n, _ in network.named_children() if n.startswith("stem_")]
    if names != ["stem_0", "stem_1"] or not isinstance(network.stem_0, nn.Conv2d):
        raise InputError(f"timm:{name}: its stem is no single convolution, so stem_stride cannot replace it; leave stem_stride out")
    width = network.stem_0.out_channels
    thin = max(width // 2, 16)
    network.stem_0 = nn.Sequential(nn.Conv2d(3, thin, 3, 1, 1), LayerNorm2d(thin), nn.GELU(), nn.Conv2d(thin, width, 3, stride, 1))


class FeaturePyramid(nn.Module):
    """[C2..C5] of a backbone -> [P2..P5], each [B,out_channels,Hl,Wl] on its own level's grid.

    ``top_down=False`` is the ablation: one 1x1 convolution for each level, and no information between levels.
    """

    def __init__(self, channels: list[int], out_channels: int, *, top_down: bool = True) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork(channels, out_channels) if top_down else None
        self.laterals = None if top_down else nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        if self.pyramid is not None:
            named = self.pyramid(OrderedDict((str(i), f) for i, f in enumerate(maps)))
            return list(named.values())
        assert self.laterals is not None
        return [lateral(f) for lateral, f in zip(self.laterals, maps, strict=True)]


def main() -> None:
    """Print the shapes and sizes of ConvNeXt-tiny and its pyramid on a 224 px image."""
    from amsdn.models.summary import print_stage

    backbone = build_backbone("tiny").eval()
    pyramid = FeaturePyramid(backbone.channels, 256)
    with torch.no_grad():
        images = torch.rand(1, 3, 224, 224)
        maps = backbone(images)
        levels = pyramid(maps)
    print_stage(backbone, {"images": images, "C2..C5": maps})
    print_stage(pyramid, {"C2..C5": maps, "P2..P5": levels})


if __name__ == "__main__":
    main()
