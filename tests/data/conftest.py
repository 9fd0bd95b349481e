from pathlib import Path

import numpy as np
import pytest


def write_arrays(folder: Path, train: int, test: int, size: int, classes: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", test)):
        np.save(folder / f"{part}_images.npy", rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
        np.save(folder / f"{part}_labels.npy", (np.arange(count) % len(classes)).astype(np.uint8))
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    return folder


@pytest.fixture
def array_folder(tmp_path):
    """The four-array layout with 50 training and 10 test images of 8 px in two classes."""
    return write_arrays(tmp_path / "arrays", 50, 10, 8, ("cat", "dog"))


@pytest.fixture
def cifar_folder(tmp_path):
    """The four-array layout as CIFAR-10, cut to 100 training and 20 test images."""
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return write_arrays(tmp_path / "cifar", 100, 20, 32, names)
