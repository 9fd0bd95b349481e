"""The samples that an evaluation keeps as pictures: ``examples/<attack>.npz``, gathered chunk by chunk.

Until all of its chunks are attacked, by one process or by several, an attack's pictures lie as ``examples.parts/<key>/<chunk>.npz``.
"""

import contextlib
import io
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amsdn.protocols import detector_of
from amsdn.records import write_atomic

Arrays = dict[str, np.ndarray]


class Examples:
    """The pictures of one attack; a chunk is a list of sample ids, always the same for all processes."""

    def __init__(self, out: Path, name: str, key: str, keep: Collection[int]) -> None:
        """``key`` stands for the attack and its settings; ``keep`` are the ids to keep, none for no pictures."""
        self.path = out / "examples" / f"{name}.npz"
        self._parts = out / "examples.parts" / key
        self._keep = frozenset(keep)

    def missing(self, chunk: Sequence[int]) -> list[int]:
        """Those of the chunk of which a picture must still be made."""
        kept = self._kept(chunk)
        return [] if not kept or self.path.exists() or self._part(chunk) is not None else kept

    def add(self, chunk: Sequence[int], arrays: Arrays) -> None:
        """Keep the pictures of one chunk (see ``example_arrays``)."""
        write_atomic(self._file(chunk), pack([arrays]))

    def finish(self, chunks: Sequence[Sequence[int]]) -> None:
        """Put the pictures of all chunks, none of which may be missing, into one file, in the chunks' order."""
        if self._keep and not self.path.exists():
            parts = [self._part(chunk) for chunk in chunks if self._kept(chunk)]
            found = [part for part in parts if part is not None]
            assert len(found) == len(parts) > 0, f"{self.path}: {len(found)} of {len(parts)} parts are there"
            write_atomic(self.path, pack(found))
        for part in self._parts.glob("*.npz"):
            part.unlink(missing_ok=True)
        for folder in (self._parts, self._parts.parent):
            with contextlib.suppress(OSError):  # it is not there, or holds another attack's parts
                folder.rmdir()

    def _kept(self, chunk: Sequence[int]) -> list[int]:
        return [i for i in chunk if i in self._keep]

    def _file(self, chunk: Sequence[int]) -> Path:
        return self._parts / f"{chunk[0]}.npz"

    def _part(self, chunk: Sequence[int]) -> Arrays | None:
        """The chunk's pictures; None where they are not there, or are those of another choice of samples."""
        try:
            with np.load(io.BytesIO(self._file(chunk).read_bytes()), allow_pickle=False) as file:
                arrays = dict(file)
            return arrays if arrays["ids"].tolist() == self._kept(chunk) else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


@torch.no_grad()
def example_arrays(model: nn.Module, x: Tensor, x_adv: Tensor, label: Tensor, prediction: Tensor, ids: Sequence[int]) -> Arrays:
    """Images x and x_adv [N,3,H,W], their labels and the attacked ones' predictions [N] as arrays, one row each.

    ids, clean and adversarial [N,3,H,W], label, clean_prediction, prediction, clean_confidence and adv_confidence (softmax of
    the predicted class), and for a detecting model anomaly_map_clean and anomaly_map_adv [N,1,H,W].
    """
    before, after = model(x).float().softmax(1), model(x_adv).float().softmax(1)
    arrays = {
        "ids": torch.tensor(list(ids)),
        "clean": x.float(),
        "adversarial": x_adv.float(),
        "label": label,
        "clean_prediction": before.argmax(1),
        "prediction": prediction,
        "clean_confidence": before.amax(1),
        "adv_confidence": after.gather(1, prediction[:, None]).squeeze(1),
    }
    if detector := detector_of(model):
        arrays["anomaly_map_clean"] = detector.analyze(x).anomaly_map.float()
        arrays["anomaly_map_adv"] = detector.analyze(x_adv).anomaly_map.float()
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def pack(parts: Sequence[Mapping[str, np.ndarray]]) -> bytes:
    """Several sets of example arrays, stacked, as the bytes of one npz file."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
