"""Published weights are really loaded, from a file or the hub's cache, and everything else is refused in one line."""

import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from amsdn.errors import InputError
from amsdn.models import hub
from amsdn.models.amsdn import AMSDN
from amsdn.models.backbone.convnext_fpn import build_backbone
from amsdn.models.backbone.pretrained import pretrained_weights


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the form that timm publishes for convnext_atto, with values of our own."""
    path = tmp_path_factory.mktemp("hub") / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = timm.create_model("convnext_atto").state_dict()
    save_file({k: torch.randn(v.shape, generator=generator) * 0.02 for k, v in state.items()}, path)
    return path


def loaded(backbone: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A feature network's tensors under timm's own names."""
    return {k.replace("network.", "").replace("stem_", "stem.").replace("stages_", "stages."): v for k, v in backbone.state_dict().items()}


@pytest.mark.parametrize("stem_stride", [4, 2])
def test_a_file_of_timms_form_fills_the_backbone_all_but_a_replaced_stem(stand_in: Path, stem_stride: int) -> None:
    published = pretrained_weights("convnext_atto", str(stand_in))
    ours = loaded(build_backbone("atto", pretrained=str(stand_in), stem_stride=stem_stride))
    same = {k for k, v in ours.items() if k in published and torch.equal(v, published[k])}
    body = {k for k in published if not k.startswith("head.")}
    assert same == (body if stem_stride == 4 else body - {"stem.0.weight", "stem.0.bias"})


def test_the_founding_call_takes_pretrained_weights(stand_in: Path) -> None:
    model = AMSDN(num_classes=100, variant="atto", pretrained=str(stand_in), purification_threshold=0.5, consistency_samples=5).eval()
    assert model.config.stem_stride == 4
    assert model.saved_config()["pretrained"] is False
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 100)


def test_pretrained_true_uses_the_hubs_cache(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def cache(repo: str, filename: str) -> str:
        asked.append((repo, filename))
        return str(stand_in)

    monkeypatch.setattr(hub, "try_to_load_from_cache", cache)
    ours = loaded(build_backbone("atto", pretrained=True, stem_stride=4))
    published = pretrained_weights("convnext_atto", str(stand_in))
    assert torch.equal(ours["stages.3.blocks.1.mlp.fc1.weight"], published["stages.3.blocks.1.mlp.fc1.weight"])
    assert asked == [("timm/convnext_atto.d2_in1k", "model.safetensors")]


def test_offline_is_one_line_with_the_address_and_the_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(InputError) as caught:
        build_backbone("atto", pretrained=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "huggingface.co/timm/convnext_atto.d2_in1k" in message
    assert 'pretrained="/path/model.safetensors"' in message
    assert "pretrained=False" in message


def test_files_that_are_not_these_weights_are_refused(stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "garbage.safetensors").write_bytes(b"\x08" * 100)
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"stem.0.weight": [1]}))
    (tmp_path / "cut.safetensors").write_bytes(stand_in.read_bytes()[:1000])
    (tmp_path / "weights.bin").write_bytes(b"x")
    save_file({"stem.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, message in {
        "missing.safetensors": "no such file",
        "garbage.safetensors": "not a readable safetensors",
        "pickle.safetensors": "not a readable safetensors",
        "cut.safetensors": "not a readable safetensors",
        "weights.bin": "must be a .safetensors file",
        "other.safetensors": "does not hold the weights of convnext_atto",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            build_backbone("atto", pretrained=str(tmp_path / name))
        assert "\n" not in str(caught.value), json.dumps(str(caught.value))
