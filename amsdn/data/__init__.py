"""Data sets behind one door: ``load_dataset("digits" | "cifar10" | "folder:DIR" | "arrays:DIR")``."""

from pathlib import Path

from amsdn.data.arrays import SMALLEST, load_arrays
from amsdn.data.augment import Augment
from amsdn.data.cifar10 import load_cifar10
from amsdn.data.digits import load_digits
from amsdn.data.folder import load_folder
from amsdn.data.sampling import batches
from amsdn.data.split import ArraySplit, Dataset, Split, SubsetSplit
from amsdn.errors import InputError

KNOWN = ("digits", "cifar10", "folder:DIR", "arrays:DIR")

__all__ = ["KNOWN", "ArraySplit", "Augment", "Dataset", "Split", "SubsetSplit", "batches", "load_dataset"]


def load_dataset(name: str, *, root: Path | str | None = None, image_size: int | None = None, limit: int | None = None) -> Dataset:
    """A data set by name, on the CPU; move it with ``.to(device)``.

    ``root`` is where cifar10 lies or is downloaded to. ``image_size`` in pixels, None for the set's own (folders: 224);
    ``limit`` cuts every split to that many samples (see ``Dataset.limited``). Raises InputError for an unknown name
    and for data that is missing, damaged or of the wrong shape or type.
    """
    if image_size is not None and image_size < SMALLEST:
        raise InputError(f"image size must be at least {SMALLEST} px, got {image_size}")
    dataset = _load(name, Path(root).expanduser() if root is not None else None, image_size)
    # First fewer images, then resizing: a quick look at a large set then costs little.
    dataset = dataset if limit is None else dataset.limited(limit)
    return dataset if image_size is None else dataset.resized(image_size)


def _load(name: str, root: Path | None, image_size: int | None) -> Dataset:
    kind, _, place = name.partition(":")
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(root)
    if kind == "folder" and place:
        return load_folder(Path(place).expanduser(), image_size)
    if kind == "arrays" and place:
        return load_arrays(Path(place).expanduser())
    raise InputError(f"unknown data set {name!r}; choose one of {', '.join(KNOWN)}")
