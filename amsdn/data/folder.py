"""``folder:DIR``: image files sorted into one folder per class, decoded as they are needed.

    DIR/train/CLASS/*   DIR/val/CLASS/*   DIR/test/CLASS/*

Where only one of ``val`` and ``test`` exists it is the test set, and a validation set is held out of train.
Classes are numbered in the order of their names. Within a split the classes take turns (the first file of
each, then the second of each, ...), so that the first n test images are of all classes.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from amsdn.data.sampling import hold_out, occurrence
from amsdn.data.split import Dataset, Split
from amsdn.errors import InputError
from amsdn.utils.images import SUFFIXES, read_image

DEFAULT_SIZE = 224
WORKERS = min(8, os.cpu_count() or 1)  # threads that decode at once


class FolderSplit(Split):
    """Image files with labels int64 [N], resized and centre-cropped to ``image_size`` by threads on every fetch."""

    def __init__(self, paths: tuple[Path, ...], labels: Tensor, image_size: int) -> None:
        assert len(paths) == len(labels), f"{len(paths)} files, {len(labels)} labels"
        self.paths, self.labels, self.image_size = paths, labels, image_size

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As in Split. Raises InputError naming the first file that cannot be used (see ``read_image``)."""
        with ThreadPoolExecutor(max_workers=WORKERS) as pool:  # Pillow decodes and resizes outside the interpreter lock
            images = list(pool.map(self.decode, indices.tolist()))
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.image_size, self.image_size)
        return stacked.to(self.device), self.labels[indices.to(self.device)]

    @property
    def decodes(self) -> bool:
        return True

    def decode(self, index: int) -> Tensor:
        """As in Split. Raises InputError for a file that cannot be used."""
        return read_image(self.paths[index], self.image_size)

    def to(self, device: torch.device | str) -> "FolderSplit":
        return FolderSplit(self.paths, self.labels.to(device), self.image_size)


def load_folder(folder: Path, image_size: int | None = None) -> Dataset:
    """The images under ``folder`` at ``image_size`` (224 if None) pixels a side. Raises InputError for an unusable layout."""
    size = image_size or DEFAULT_SIZE
    if not (folder / "train").is_dir():
        raise InputError(f"{folder}: no train folder there; put images in {folder / 'train'}/CLASS/ and {folder / 'test'}/CLASS/")
    held = [name for name in ("val", "test") if (folder / name).is_dir()]
    if not held:
        raise InputError(f"{folder}: neither a val nor a test folder there; put test images in {folder / 'test'}/CLASS/")
    classes = _class_names(folder / "train")
    for name in held:
        _check_same_classes(folder / name, classes)
    splits = {name: _scan(folder / name, classes, size) for name in ("train", *held)}
    train, val, test = splits["train"], splits[held[0]], splits[held[-1]]
    if len(held) == 1:
        keep, held_out = hold_out(train.labels, str(folder / "train"))
        return Dataset(f"folder:{folder}", train.subset(keep), train.subset(held_out), test, classes, size)
    return Dataset(f"folder:{folder}", train, val, test, classes, size)


def _class_names(split_folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in split_folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise InputError(f"{split_folder}: no class folders there; make one folder of images per class")
    return names


def _check_same_classes(split_folder: Path, classes: tuple[str, ...]) -> None:
    found = set(_class_names(split_folder))
    if lacking := sorted(set(classes) - found):
        raise InputError(f"{split_folder}: no folder for the class {lacking[0]!r} of train ({len(lacking)} missing); add it")
    if extra := sorted(found - set(classes)):
        raise InputError(f"{split_folder}: the class {extra[0]!r} is not in train ({len(extra)} such); remove it or add it there")


def _scan(split_folder: Path, classes: tuple[str, ...], image_size: int) -> FolderSplit:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (split_folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and _visible(p))
        if not found:
            raise InputError(f"{split_folder / name}: no images of this class ({', '.join(SUFFIXES)}); add some or remove the class")
        paths += found
        labels += [label] * len(found)
    order = occurrence(torch.tensor(labels)).argsort(stable=True)
    return FolderSplit(tuple(paths[i] for i in order.tolist()), torch.tensor(labels)[order], image_size)


def _visible(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")
