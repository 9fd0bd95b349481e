"""Every backbone honours the four-level interface, at every image size, and refuses what it cannot be."""

import pytest
import torch
from torch import nn

from amsdn.errors import InputError
from amsdn.models.backbone.convnext_fpn import FeaturePyramid, build_backbone
from amsdn.models.normalize import Normalize


@pytest.mark.parametrize(
    ("variant", "stem_stride", "size"),
    [
        ("compact", None, 32), ("compact", None, 64), ("compact", 2, 224), ("preact18", None, 32),
        ("atto", 1, 32), ("atto", 2, 32), ("atto", 4, 64), ("atto", 2, 224), ("pico", 2, 32), ("tiny", 2, 32),
        ("timm:resnet18", None, 64), ("timm:convnextv2_atto", 2, 32),
    ],
)  # fmt: skip
def test_levels_have_the_declared_channels_and_strides(variant: str, stem_stride: int | None, size: int) -> None:
    backbone = build_backbone(variant, stem_stride=stem_stride, width=8).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, size, size))
    assert [list(m.shape) for m in maps] == [[2, c, size // s, size // s] for c, s in zip(backbone.channels, backbone.strides, strict=True)]
    assert backbone.strides == [backbone.strides[0] * 2**i for i in range(4)]
    assert stem_stride is None or backbone.strides[0] == stem_stride


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "huge"}, "variant 'huge' is unknown"),
        ({"variant": "timm:no_such_net"}, "has no such network"),
        ({"variant": "timm:vit_tiny_patch16_224"}, "strides|four-level"),
        ({"variant": "timm:resnet18", "stem_stride": 2}, "applies to ConvNeXt only"),
        ({"variant": "timm:convnext_atto_ols", "stem_stride": 2}, "no single convolution"),
        ({"variant": "atto", "stem_stride": 3}, "stem_stride must be 1, 2 or 4"),
        ({"variant": "atto", "drop_path": 1.0}, "drop_path must lie"),
        ({"variant": "compact", "pretrained": True}, "no published weights"),
        ({"variant": "compact", "stem_stride": 4}, "has stem_stride 2"),
        ({"variant": "compact", "drop_path": 0.1}, "has no drop_path"),
        ({"variant": "compact", "width": 0}, "width must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_backbone(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_layer_scale_and_drop_path_reach_convnext() -> None:
    backbone = build_backbone("atto", drop_path=0.05)
    gammas = [p for n, p in backbone.named_parameters() if n.endswith("gamma")]
    assert gammas
    assert all(torch.equal(g, torch.full_like(g, 1e-2)) for g in gammas)
    rates = [float(m.drop_prob) for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.05)


def test_without_top_down_a_level_depends_on_its_own_map_only() -> None:
    maps = [torch.rand(1, c, s, s) for c, s in zip((4, 8), (4, 2), strict=True)]
    changed = [maps[0], maps[1] + 1]
    for top_down in (True, False):
        pyramid = FeaturePyramid([4, 8], 6, top_down=top_down)
        before, after = pyramid(maps), pyramid(changed)
        assert [list(p.shape) for p in before] == [[1, 6, 4, 4], [1, 6, 2, 2]]
        assert torch.equal(before[0], after[0]) is not top_down
        assert not torch.equal(before[1], after[1])


def test_normalize_is_the_affine_map_and_its_inverse_exists() -> None:
    layer = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    mean = torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1)
    assert torch.equal(layer(mean.expand(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))
    assert torch.allclose(layer(mean + 1).flatten(), torch.tensor([2.0, 1.0, 0.5]))
    assert not list(layer.parameters())
    with pytest.raises(InputError, match="positive stds"):
        Normalize((0.5, 0.5, 0.5), (1.0, 0.0, 1.0))


def test_batch_members_do_not_mix_in_eval_mode() -> None:
    backbone: nn.Module = build_backbone("compact", width=4).eval()
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together, alone = backbone(x), backbone(x[1:2])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, atol=1e-5, rtol=1e-5)
