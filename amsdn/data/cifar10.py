"""CIFAR-10 (Krizhevsky, 2009): 60,000 photographs of 32x32 pixels in ten classes.

Two sources: the four-array layout of ``amsdn.data.arrays``, which may hold fewer images, or the official
archive through torchvision. Either way the last 2,000 training images (one in 25 of a smaller set) are the
validation set, and the test images keep their order.
"""

import os
import socket
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torchvision

from amsdn.data.arrays import ARRAY_FILES, LAYOUT, read_arrays
from amsdn.data.sampling import held_out_size
from amsdn.data.split import ArraySplit, Dataset
from amsdn.errors import InputError

DEFAULT_ROOT = Path("data")
IMAGE_SIZE, CLASSES = 32, 10
OFFICIAL = {"train": 50_000, "test": 10_000}
CONNECT_TIMEOUT_S = 30.0


def load_cifar10(root: Path | None = None) -> Dataset:
    """CIFAR-10 from ``root``, else the folder in AMSDN_DATA, else ``data/``; downloaded there if it is not there yet.

    Raises InputError, with both remedies, where there is neither data nor a connection, and for damaged or foreign arrays.
    """
    folder = root or Path(os.environ.get("AMSDN_DATA") or DEFAULT_ROOT).expanduser()
    arrays_there = any((folder / name).exists() for name in ARRAY_FILES)
    train, test, classes = _from_arrays(folder) if arrays_there else _official(folder)
    cut = len(train) - held_out_size(len(train), str(folder / ARRAY_FILES[0]))
    return Dataset(
        name="cifar10",
        train=ArraySplit(train.images[:cut], train.labels[:cut]),
        val=ArraySplit(train.images[cut:], train.labels[cut:]),
        test=test,
        classes=classes,
        image_size=IMAGE_SIZE,
    )


def _from_arrays(folder: Path) -> tuple[ArraySplit, ArraySplit, tuple[str, ...]]:
    train, test, classes = read_arrays(folder)
    size = train.images.shape[-1]
    if size != IMAGE_SIZE or len(classes) != CLASSES:
        raise InputError(
            f"{folder}: holds {len(classes)} classes at {size} px, but CIFAR-10 has {CLASSES} at {IMAGE_SIZE} px; use arrays:{folder}"
        )
    return train, test, classes


def _official(folder: Path) -> tuple[ArraySplit, ArraySplit, tuple[str, ...]]:
    source = torchvision.datasets.CIFAR10
    try:
        with _network_timeout(CONNECT_TIMEOUT_S), warnings.catch_warnings():
            # The archive's pickles date from NumPy 1 and make NumPy 2.4 warn; nothing a user can act on.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            # These batches are pickles. torchvision compares each with its own known MD5 digest before it opens
            # any, and raises otherwise, so what is unpickled is the official file and nothing else.
            parts = {"train": source(folder, train=True, download=True), "test": source(folder, train=False)}
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(
            f"cifar10: {folder} holds neither arrays nor a valid {source.filename}, and downloading {source.url} failed ({reason}); "
            f"put {source.filename} there, or {LAYOUT} (choose the folder with --data-root or AMSDN_DATA)"
        ) from e
    splits = {}
    for name, part in parts.items():
        if part.data.shape != (OFFICIAL[name], IMAGE_SIZE, IMAGE_SIZE, 3) or len(part.targets) != OFFICIAL[name]:
            raise InputError(
                f"{folder}: the {name} set has shape {list(part.data.shape)}, not {OFFICIAL[name]} images; delete it to download it again"
            )
        splits[name] = ArraySplit(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
    return splits["train"], splits["test"], tuple(parts["train"].classes)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets no timeout of its own, and a firewall that drops packets would hang it for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
