import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from amsdn.data import load_dataset
from amsdn.data.arrays import load_arrays
from amsdn.errors import InputError


class Explosive:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_reads_the_layout(array_folder):
    data = load_arrays(array_folder)
    assert (len(data.train), len(data.val), len(data.test)) == (48, 2, 10)
    assert data.classes == ("cat", "dog")
    assert data.image_size == 8
    stored = np.load(array_folder / "test_images.npy")
    images, labels = data.test.fetch(torch.tensor([3, 9]))
    assert torch.equal(images, torch.from_numpy(stored[[3, 9]]).permute(0, 3, 1, 2).float() / 255)
    assert labels.tolist() == np.load(array_folder / "test_labels.npy")[[3, 9]].tolist()


def test_train_and_val_are_a_partition_of_the_training_images(array_folder):
    data = load_arrays(array_folder)
    both = torch.cat([data.train.fetch(torch.arange(48))[0], data.val.fetch(torch.arange(2))[0]]).flatten(1)
    stored = torch.from_numpy(np.load(array_folder / "train_images.npy")).permute(0, 3, 1, 2).flatten(1) / 255
    assert torch.equal(both.unique(dim=0), stored.unique(dim=0))
    assert sorted(data.val.labels.tolist()) == [0, 1]


def test_files_are_not_changed_by_use(array_folder):
    before = (array_folder / "train_images.npy").read_bytes()
    split = load_arrays(array_folder).test
    split.images.zero_()
    load_arrays(array_folder).train.base.images.zero_()
    assert (array_folder / "train_images.npy").read_bytes() == before


def test_the_door_limits_and_resizes(array_folder):
    data = load_dataset(f"arrays:{array_folder}", limit=4, image_size=12)
    assert (len(data.train), len(data.test), data.image_size) == (4, 4, 12)
    assert data.test.fetch(torch.arange(4))[0].shape == (4, 3, 12, 12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8"])
def test_any_integer_labels(array_folder, dtype):
    labels = np.load(array_folder / "test_labels.npy")
    np.save(array_folder / "test_labels.npy", labels.astype(dtype))
    assert load_arrays(array_folder).test.labels.tolist() == labels.tolist()


def test_fortran_order(array_folder):
    images = np.load(array_folder / "test_images.npy")
    np.save(array_folder / "test_images.npy", np.asfortranarray(images))
    assert torch.equal(load_arrays(array_folder).test.images, torch.from_numpy(images).permute(0, 3, 1, 2))


def images(shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


BAD_ARRAYS = {
    "float images": ("train_images.npy", images((50, 8, 8, 3), np.float32), "must be uint8"),
    "channels first": ("train_images.npy", images((50, 3, 8, 8)), r"must have shape \[N,H,W,3\]"),
    "grey": ("train_images.npy", images((50, 8, 8)), r"must have shape \[N,H,W,3\]"),
    "empty": ("test_images.npy", images((0, 8, 8, 3)), "holds no images"),
    "not square": ("train_images.npy", images((50, 8, 9, 3)), "must be square"),
    "tiny": ("train_images.npy", images((50, 4, 4, 3)), "at least 8 px"),
    "unequal sizes": ("test_images.npy", images((10, 16, 16, 3)), "16 px but training images are 8 px"),
    "one image": ("train_images.npy", images((1, 8, 8, 3)), r"must have shape \[1\]"),
    "float labels": ("train_labels.npy", np.zeros(50), "must be integers"),
    "bool labels": ("train_labels.npy", np.zeros(50, bool), "must be integers"),
    "short labels": ("train_labels.npy", np.zeros(49, np.int64), r"must have shape \[50\]"),
    "one-hot labels": ("train_labels.npy", np.zeros((50, 2), np.int64), r"must have shape \[50\]"),
    "negative label": ("train_labels.npy", np.full(50, -1), "label -1 is negative"),
    "unnamed label": ("test_labels.npy", np.full(10, 2), "label 2 has no name, classes.txt lists 2"),
    "objects": ("train_labels.npy", np.array([None] * 50, object), "not a whole .npy file of plain numbers"),
}


@pytest.mark.parametrize(("name", "array", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_arrays_are_named(array_folder, name, array, message):
    np.save(array_folder / name, array)
    with pytest.raises(InputError, match=message) as error:
        load_arrays(array_folder)
    reported = "train_labels.npy" if array.shape[:1] == (1,) else name
    assert one_line(error).startswith(str(array_folder / reported))


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", "classes.txt"])
def test_a_missing_file_is_named(array_folder, name):
    (array_folder / name).unlink()
    with pytest.raises(InputError, match="missing") as error:
        load_arrays(array_folder)
    assert one_line(error).startswith(str(array_folder / name))


@pytest.mark.parametrize("keep", [0, 5, 40, 200, -1])
def test_a_truncated_file_is_named(array_folder, keep):
    path = array_folder / "train_images.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"not a whole \.npy file") as error:
        load_arrays(array_folder)
    assert one_line(error).startswith(str(path))


def test_pickles_and_zips_posing_as_arrays_are_not_opened(array_folder, tmp_path):
    mark = tmp_path / "mark"
    path = array_folder / "train_labels.npy"
    np.save(path, np.array([Explosive(mark)] * 50, dtype=object), allow_pickle=True)
    posing = [path.read_bytes(), pickle.dumps(Explosive(mark))]
    np.savez(tmp_path / "zip.npz", np.zeros(50, np.int64))
    posing.append((tmp_path / "zip.npz").read_bytes())
    for content in posing:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"not a whole \.npy file") as error:
            load_arrays(array_folder)
        one_line(error)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"cat\ncat\n", "'cat' is listed twice"),
        (b"cat\n\xff\n", "not readable as UTF-8"),
    ],
)
def test_bad_class_names(array_folder, content, message):
    (array_folder / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_arrays(array_folder)
    one_line(error)


def test_windows_line_ends_and_trailing_blank_lines(array_folder):
    (array_folder / "classes.txt").write_bytes(b"cat\r\ndog\r\n\r\n")
    assert load_arrays(array_folder).classes == ("cat", "dog")


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such data folder; it should hold train_images"):
        load_dataset(f"arrays:{tmp_path / 'nowhere'}")
