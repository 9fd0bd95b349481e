"""ONNX files of small networks, made by torch; a test that asks for one is skipped where onnxruntime or onnx is not installed."""

import functools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

NAME = "net.onnx"


def tiny_net(classes: int = 4, seed: int = 0) -> nn.Module:
    """A convolutional network of a few weights for images of 16 px or more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 6, 3, 2, 1), nn.GELU(), nn.Conv2d(6, 8, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(8, classes)).eval()


def export(path: Path, *, seed: int = 0, batch: int | None = None, external: bool = False) -> Path:
    """``tiny_net(seed=seed)`` as an ONNX file for batches of ``batch``, or of any size; its weights in it, or in FILE.data beside it."""
    for package in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'amsdn[dev]'")
    for suffix, content in _exported(seed, batch, external).items():
        path.with_name(f"{NAME}{suffix}" if suffix else path.name).write_bytes(content)
    return path


@functools.cache  # seconds each
def _exported(seed: int, batch: int | None, external: bool) -> dict[str, bytes]:
    """The files by what follows their name; the first names the second, so that one must be called ``NAME``.data."""
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, which come and go with its versions
        path, example = Path(folder) / NAME, (torch.rand(batch or 2, 3, 16, 16),)
        torch.onnx.export(tiny_net(seed=seed), example, path, dynamo=True, verbose=False, dynamic_shapes=shapes, external_data=external)
        return {file.name.removeprefix(NAME): file.read_bytes() for file in Path(folder).iterdir()}
