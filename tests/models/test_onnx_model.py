"""A network in an ONNX file answers as it did in torch, says that it has no gradients, and is refused in one line where it does not fit."""

import builtins
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_files import export, tiny_net
from torch import Tensor, nn

from amsdn.attacks import PGDAttack, SparseRS
from amsdn.errors import InputError
from amsdn.evaluation.run_folder import model_fingerprint
from amsdn.models.onnx_model import OnnxModel
from amsdn.protocols import is_black_box


def images(count: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("batch", [None, 1, 4])
@torch.no_grad()
def test_logits_are_those_of_torch_whatever_the_batch(batch: int | None, tmp_path: Path) -> None:
    net = tiny_net()
    model = OnnxModel(export(tmp_path / "net.onnx", batch=batch))
    assert model.batch == batch
    assert model.num_classes == 4
    for count in (1, 3, 7):
        x = images(count)
        before = x.clone()
        answer = model(x)
        assert answer.dtype == torch.float32
        torch.testing.assert_close(answer, net(x), atol=1e-4, rtol=0)
        assert torch.equal(x, before)
        assert torch.equal(model(x), answer)
        strided = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(strided), answer, atol=1e-6, rtol=0)
    outside = 3 * images(3) - 1  # as smoothing shows it
    torch.testing.assert_close(model(outside), net(outside), atol=1e-4, rtol=0)


def test_it_is_a_black_box_in_eval_mode(tmp_path: Path) -> None:
    model = OnnxModel(export(tmp_path / "net.onnx"))
    assert is_black_box(model)
    assert is_black_box(nn.Sequential(model))
    assert not model.training
    assert not model(images(2).requires_grad_(True)).requires_grad
    x = images(3)
    y = model(x).argmax(1)
    with pytest.raises(InputError, match="PGDAttack: follows gradients"):
        PGDAttack()(model, x, y)
    found, again = (SparseRS(3, 30)(model, x, y) for _ in range(2))
    assert torch.equal(found.x_adv, again.x_adv)
    assert torch.equal(found.prediction, model(found.x_adv).argmax(1))


@pytest.mark.parametrize("external", [False, True])
def test_two_networks_have_two_fingerprints_wherever_their_weights_lie(external: bool, tmp_path: Path) -> None:
    """Files of one architecture whose weights lie beside them are the same, byte for byte."""
    prints = set()
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        path = export(tmp_path / str(seed) / "net.onnx", seed=seed, external=external)
        assert (tmp_path / str(seed) / "net.onnx.data").exists() == external
        prints.add(model_fingerprint(OnnxModel(path)))
        assert model_fingerprint(OnnxModel(path)) in prints
    assert len(prints) == 2
    elsewhere = tmp_path / "elsewhere.onnx"
    elsewhere.write_bytes((tmp_path / "0" / "net.onnx").read_bytes())
    if external:
        with pytest.raises(InputError, match="onnxruntime cannot open it") as caught:
            OnnxModel(elsewhere)
        assert "\n" not in str(caught.value)
    else:
        assert model_fingerprint(OnnxModel(elsewhere)) in prints


def graph(path: Path, inputs: dict[str, tuple[str, list[int | str]]], outputs: dict[str, list[int | str] | None]) -> Path:
    """An ONNX file of these inputs whose every output is the mean over places of the first one."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'amsdn[onnx]'")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed; pip install 'amsdn[dev]'")
    first = next(iter(inputs))
    kinds = {name: getattr(onnx.TensorProto, kind) for name, (kind, _) in inputs.items()}
    nodes = [node for name in outputs for node in _mean(onnx, first, name)]
    body = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(name, kinds[name], shape) for name, (_, shape) in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, kinds[first], shape) for name, shape in outputs.items()],
    )
    onnx.save(onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _mean(onnx: object, source: str, target: str) -> list[object]:
    return [onnx.helper.make_node("ReduceMean", [source], [target], axes=[2, 3], keepdims=0)]  # type: ignore[attr-defined]


FLOAT4: tuple[str, list[int | str]] = ("FLOAT", ["b", 3, "h", "w"])


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ({"x": FLOAT4, "mask": FLOAT4}, {"y": ["b", 3]}, "has inputs x .*, mask .*; it must have one"),
        ({"x": ("INT32", ["b", 3, 8, 8])}, {"y": ["b", 3]}, r"has inputs x tensor\(int32\)"),
        ({"x": ("FLOAT", ["b", 8, 8, 3])}, {"y": ["b", 8]}, "colours first"),
        ({"x": ("FLOAT", ["b", 1, 8, 8])}, {"y": ["b", 1]}, "colours first"),
        ({"x": ("FLOAT", ["b", 3, 8, 8, 2])}, {"y": ["b", 3, 2]}, r"one floating point input \[B,3,H,W\]"),
        ({"x": FLOAT4}, {"y": ["b", 3], "z": ["b", 3]}, r"has outputs y .*, z .*; it must have one, logits \[B,K\]"),
    ],
)
def test_networks_of_another_form_are_refused(
    inputs: dict[str, tuple[str, list[int | str]]], outputs: dict[str, list[int | str] | None], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        OnnxModel(graph(tmp_path / "net.onnx", inputs, outputs))
    assert str(caught.value).startswith(str(tmp_path / "net.onnx"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "DOUBLE"])
def test_numbers_of_any_precision_and_an_output_of_unknown_shape(kind: str, tmp_path: Path) -> None:
    model = OnnxModel(graph(tmp_path / "net.onnx", {"x": (kind, ["b", "c", "h", "w"])}, {"y": None}))
    x = images(3, 8)
    assert model.num_classes is None
    assert model(x).dtype == torch.float32
    torch.testing.assert_close(model(x), x.mean((2, 3)), atol=2e-3, rtol=0)


def test_images_of_another_size_than_the_files(tmp_path: Path) -> None:
    model = OnnxModel(export(tmp_path / "net.onnx"))
    with pytest.raises(InputError, match=r"takes images of 16x16, got 32x32; pass --image-size 16"):
        model(images(2, 32))


def test_files_that_are_no_networks(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'amsdn[onnx]'")
    (tmp_path / "garbage.onnx").write_bytes(b"\x08" * 100)
    (tmp_path / "empty.onnx").touch()
    for name, says in {"none.onnx": "No such file", "garbage.onnx": "onnxruntime cannot open it", "empty.onnx": "empty.onnx: "}.items():
        with pytest.raises(InputError, match=says) as caught:
            OnnxModel(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_without_onnxruntime_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *more: object) -> object:
        if name == "onnxruntime":
            raise builtins.ModuleNotFoundError("No module named 'onnxruntime'")
        return real(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib, "import_module", missing)
    (tmp_path / "net.onnx").write_bytes(np.zeros(3).tobytes())
    with pytest.raises(InputError, match=r"pip install 'amsdn\[onnx\]'"):
        OnnxModel(tmp_path / "net.onnx")
