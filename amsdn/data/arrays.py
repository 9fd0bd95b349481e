"""``arrays:DIR``: a data set in four NumPy files and a list of class names.

    train_images.npy  test_images.npy   uint8 [N,H,W,3], RGB, square
    train_labels.npy  test_labels.npy   any integer type [N], 0 to K-1
    classes.txt                         K names, one a line, in label order

Files are memory-mapped and never unpickled. A validation set is held out of the training images.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amsdn.data.sampling import hold_out
from amsdn.data.split import ArraySplit, Dataset
from amsdn.errors import InputError

ARRAY_FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")
LAYOUT = f"{', '.join(ARRAY_FILES)} and classes.txt"
SMALLEST = 8  # pixels a side, as in amsdn.utils.images


def load_arrays(folder: Path) -> Dataset:
    """The arrays in ``folder`` with a stratified validation set held out of train. Raises InputError for unusable files."""
    train, test, classes = read_arrays(folder)
    keep, held_out = hold_out(train.labels, str(folder / "train_images.npy"))
    return Dataset(f"arrays:{folder}", train.subset(keep), train.subset(held_out), test, classes, train.images.shape[-1])


def read_arrays(folder: Path) -> tuple[ArraySplit, ArraySplit, tuple[str, ...]]:
    """(train, test, class names) of the four-array layout, checked. Raises InputError naming the file and the remedy."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such data folder; it should hold {LAYOUT}")
    classes = _read_classes(folder / "classes.txt")
    train, test = (_read_split(folder, part, classes) for part in ("train", "test"))
    ours, theirs = train.images.shape[-1], test.images.shape[-1]
    if ours != theirs:
        raise InputError(f"{folder / 'test_images.npy'}: images are {theirs} px but training images are {ours} px; resize one of the two")
    return train, test, classes


def _read_split(folder: Path, part: str, classes: tuple[str, ...]) -> ArraySplit:
    path = folder / f"{part}_images.npy"
    images = _read_npy(path)
    if images.dtype != np.uint8:
        raise InputError(f"{path}: images must be uint8 (0 to 255), not {images.dtype}; convert them and save again")
    if images.ndim != 4 or images.shape[3] != 3:
        raise InputError(f"{path}: images must have shape [N,H,W,3], not {list(images.shape)}; move or repeat the channels and save again")
    if len(images) == 0:
        raise InputError(f"{path}: holds no images; put at least one there")
    height, width = images.shape[1:3]
    if height != width or height < SMALLEST:
        raise InputError(f"{path}: images must be square and at least {SMALLEST} px, not {height}x{width}; crop or resize them")
    labels = _read_labels(folder / f"{part}_labels.npy", len(images), path.name, classes)
    return ArraySplit(torch.from_numpy(images).permute(0, 3, 1, 2), labels)


def _read_labels(path: Path, count: int, images_name: str, classes: tuple[str, ...]) -> Tensor:
    labels = _read_npy(path)
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{path}: labels must be integers, not {labels.dtype}; convert them and save again")
    if labels.shape != (count,):
        raise InputError(f"{path}: labels must have shape [{count}] to match {images_name}, not {list(labels.shape)}; save them again")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise InputError(f"{path}: label {low} is negative; number the classes from 0")
    if high >= len(classes):
        raise InputError(f"{path}: label {high} has no name, classes.txt lists {len(classes)}; add the missing names or correct the labels")
    return torch.from_numpy(labels.astype(np.int64))


def _read_npy(path: Path) -> NDArray[np.generic]:
    if not path.is_file():
        raise InputError(f"{path}: missing; the folder should hold {LAYOUT}")
    try:
        # Reads the .npy format alone: never a pickle, never a zip. Copy-on-write ("c") gives torch a tensor that
        # it may call writable, while the file stays as it is and pages are read only when they are used.
        return np.asarray(np.lib.format.open_memmap(path, mode="c"))
    except (OSError, ValueError, EOFError, OverflowError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: not a whole .npy file of plain numbers ({reason}); write it again with numpy.save") from e


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    except FileNotFoundError as e:
        raise InputError(f"{path}: missing; write one class name a line, in label order") from e
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not readable as UTF-8 text ({e}); write one class name a line, in label order") from e
    if not names or not all(names):
        raise InputError(f"{path}: {'line ' + str(names.index('') + 1) if names else 'the file'} is empty; write one class name a line")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(f"{path}: the class {twice!r} is listed twice; give every class its own name")
    return names
