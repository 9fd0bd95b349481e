"""A saved model comes back bit for bit, by both roads; anything else is one clear line."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amsdn.errors import InputError
from amsdn.models import AMSDN, load_model, save_model


@pytest.fixture
def model() -> AMSDN:
    built = AMSDN(variant="compact", width=4, num_classes=3, consistency_samples=1, mean=(0.5, 0.4, 0.3)).eval()
    built.calibrate(torch.linspace(0, 0.777, 50))
    return built


@pytest.fixture
def folder(model: AMSDN, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def assert_same(a: AMSDN, b: AMSDN) -> None:
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_round_trip(model: AMSDN, folder: Path) -> None:
    again = load_model(folder)
    assert_same(model, again)
    assert not again.training
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_hubs_mixin_and_ours_read_each_other(model: AMSDN, folder: Path, tmp_path: Path) -> None:
    assert_same(model, AMSDN.from_pretrained(folder))
    model.save_pretrained(tmp_path / "hub")
    assert_same(model, load_model(tmp_path / "hub"))


def test_half_precision_rounds_weights_but_not_the_decision(model: AMSDN, folder: Path, tmp_path: Path) -> None:
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    again = load_model(tmp_path / "half")
    assert torch.equal(again.detection_threshold, model.detection_threshold)
    assert torch.equal(again.classifier.weight, model.classifier.weight.bfloat16().float())
    assert (tmp_path / "half/model.safetensors").stat().st_size < 0.7 * (folder / "model.safetensors").stat().st_size


def test_saving_over_a_model_replaces_it_and_a_failed_save_leaves_it(
    model: AMSDN, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = AMSDN(variant="compact", width=5)
    with monkeypatch.context() as patch:
        patch.setattr("amsdn.records.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match="No space left"):
            save_model(other, folder)
    assert_same(model, load_model(folder))
    save_model(other, folder)
    assert_same(other.eval(), load_model(folder))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write the model"):
        save_model(model, tmp_path / "file" / "model")


def test_loading_never_downloads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pretrained": True}))  # compact would refuse it
    assert load_model(folder).config.pretrained is False


class Bomb:
    """Unpickling this would create the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(InputError, match="not a safetensors file"):
        load_model(folder)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/weights.pt").write_bytes(bomb)
    with pytest.raises(InputError, match=r"weights\.pt may be a pickle, which is never opened"):
        load_model(tmp_path / "old")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("kept", [0, 5, 100, 2000])
def test_truncated_weights_are_one_line(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="damaged or not a safetensors file") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_wrong_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bias = "classifier.bias"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != bias}, f"lacks tensor '{bias}'"),
        (tensors | {"extra": torch.zeros(1)}, "has unexpected tensor 'extra'"),
        (tensors | {bias: torch.zeros(7)}, rf"'{bias}' has shape \[7\], needs \[3\]"),
    ):
        save_file(changed, path)
        with pytest.raises(InputError, match=message):
            load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "must hold one JSON object"),
        ('{"colour": 1}', "unknown field 'colour'"),
        ('{"num_classes": "ten"}', "field 'num_classes' cannot be 'ten'"),
        ('{"mean": [0.5, 0.5]}', "field 'mean' cannot be"),
        ('{"width": true}', "field 'width' cannot be True"),
    ],
)
def test_a_broken_configuration_is_one_line(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_model(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(folder)
    save_model(AMSDN(variant="compact", width=4), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load_model(folder)


def test_a_name_that_is_neither_folder_nor_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amsdn.models.hub.get_hf_file_metadata", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(InputError, match="checkpoints/nothing: no such folder, and the hub gave no such model"):
        load_model("checkpoints/nothing")
