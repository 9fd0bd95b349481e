"""A network in an ONNX file as a classifier: run by onnxruntime, on the CPU, without gradients.

onnxruntime is an optional dependency: ``pip install 'amsdn[onnx]'``. Whatever the network does to its images, normalisation
included, must be inside the file: it is given images in [0,1].
"""

import hashlib
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amsdn.errors import InputError

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
# An entry of external_data in the protobuf that an ONNX file is: field 1 is the key, "location", field 2 the other file's name, after
# its length in groups of seven bits.
LOCATION = re.compile(rb"\x0a\x08location\x12([\x80-\xff]*[\x00-\x7f])")


class OnnxModel(nn.Module):
    """images [B,3,H,W] in [0,1] -> logits [B,K], float32, on the device of the images.

    The file must have one floating point input [B,3,H,W] and one output [B,K]; where B, H or W are fixed in it, H and W are what
    images must have, and batches are run in pieces of B, the last filled up. Threads are as many as torch uses when it is opened.
    The buffer ``digest`` is the SHA-256 of the file, and of those that its weights lie in, so that two networks have two fingerprints.
    """

    black_box = True  # see amsdn.protocols
    digest: Tensor  # [32] uint8

    def __init__(self, path: Path | str) -> None:
        """Raises InputError, in one line, where onnxruntime is missing, and for a file that is missing, damaged, or of another form."""
        super().__init__()
        self.path = Path(path)
        content = _read(self.path)
        self._session = _session(self.path)
        (self._input, self._dtype, shape), self.num_classes = _input_of(self._session, self.path), _classes_of(self._session, self.path)
        self.batch, self.height, self.width = shape
        self.register_buffer("digest", torch.tensor(list(_digest(content, self.path.parent)), dtype=torch.uint8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Raises InputError for images of another size than the file's, and where onnxruntime fails."""
        for fixed, found in ((self.height, x.shape[2]), (self.width, x.shape[3])):
            if fixed not in (None, found):
                size = "x".join(str(s or "any") for s in (self.height, self.width))
                raise InputError(f"{self.path}: takes images of {size}, got {x.shape[2]}x{x.shape[3]}; pass --image-size {fixed}")
        images = x.detach().cpu().numpy().astype(self._dtype)
        logits = np.concatenate([self._run(piece) for piece in self._pieces(images)])[: len(x)]
        return torch.from_numpy(logits.astype(np.float32)).to(x.device)

    def extra_repr(self) -> str:
        return str(self.path)

    def _pieces(self, images: np.ndarray) -> list[np.ndarray]:
        """The batch, in pieces of the file's own size where that is fixed; the last image fills up the last piece."""
        if self.batch is None:
            return [images]
        missing = -len(images) % self.batch
        filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        return list(filled.reshape(-1, self.batch, *images.shape[1:]))

    def _run(self, images: np.ndarray) -> np.ndarray:
        try:
            (logits,) = self._session.run(None, {self._input: images})
        except Exception as e:  # the runtime's errors have no common base
            raise InputError(f"{self.path}: onnxruntime fails on images {list(images.shape)} ({_first_line(e)})") from e
        if logits.ndim != 2 or len(logits) != len(images):
            raise InputError(f"{self.path}: answers {list(images.shape)} images with {list(logits.shape)}; it must give logits [B,K]")
        answer: np.ndarray = logits
        return answer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path") from e


def _session(path: Path) -> Any:
    try:
        ort: Any = importlib.import_module("onnxruntime")
    except ImportError as e:
        raise InputError(f"{path}: needs onnxruntime, which is not installed ({e}); pip install 'amsdn[onnx]'") from e
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what is wrong comes as an exception: nothing more on the terminal
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise InputError(f"{path}: onnxruntime cannot open it ({_first_line(e)}); export it again") from e


def _input_of(session: Any, path: Path) -> tuple[str, Any, tuple[int | None, int | None, int | None]]:
    """The name of the only input, its number type, and what is fixed of batch, height and width."""
    inputs = session.get_inputs()
    told = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs) or "none"
    remedy = "it must have one floating point input [B,3,H,W]"
    if len(inputs) != 1 or inputs[0].type not in DTYPES or len(inputs[0].shape) != 4:
        raise InputError(f"{path}: has inputs {told}; {remedy}")
    batch, channels, height, width = (side if isinstance(side, int) and side > 0 else None for side in inputs[0].shape)
    if channels not in (None, 3):
        raise InputError(f"{path}: has inputs {told}; {remedy}, colours first")
    return inputs[0].name, DTYPES[inputs[0].type], (batch, height, width)


def _classes_of(session: Any, path: Path) -> int | None:
    """K of the only output [B,K], or None where the file leaves it open."""
    outputs = session.get_outputs()
    if len(outputs) != 1 or outputs[0].type not in DTYPES or len(outputs[0].shape or (0, 0)) != 2:
        told = ", ".join(f"{o.name} {o.type} {o.shape}" for o in outputs) or "none"
        raise InputError(f"{path}: has outputs {told}; it must have one, logits [B,K]")
    classes = outputs[0].shape[1] if outputs[0].shape else None
    return classes if isinstance(classes, int) and classes > 0 else None


def _digest(content: bytes, folder: Path) -> bytes:
    """SHA-256 of an ONNX file and of the files in ``folder`` that it names for its weights."""
    digest = hashlib.sha256(content)
    for path in (folder / name for name in sorted(set(_external(content)))):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def _external(content: bytes) -> list[str]:
    """The names of the files that hold tensors of an ONNX file; onnxruntime itself refuses those that do not lie beside it."""
    found = []
    for entry in LOCATION.finditer(content):
        length = sum((byte & 127) << 7 * i for i, byte in enumerate(entry.group(1)))
        found.append(content[entry.end() : entry.end() + length].decode("utf-8", "replace"))
    return found


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
