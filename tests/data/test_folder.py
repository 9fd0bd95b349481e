import numpy as np
import pytest
import torch
from PIL import Image

from amsdn.data import load_dataset
from amsdn.data.folder import load_folder
from amsdn.errors import InputError

CLASSES = ("ant", "bee")


def paint(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes; ant images are red, bee images green, and the second colour value is the image's number."""
    for part, count in (("train", 6), ("test", 2)):
        for i in range(count):
            paint(tmp_path / part / "ant" / f"{i}.png", (255, i, 0))
            paint(tmp_path / part / "bee" / f"{i}.png", (0, i, 255))
    return tmp_path


def numbers(split):
    images, labels = split.fetch(torch.arange(len(split)))
    return [(int(label), round(float(image[1, 0, 0]) * 255)) for image, label in zip(images, labels, strict=True)]


def test_test_alone_is_the_test_set_and_classes_take_turns(folder):
    data = load_folder(folder, 16)
    assert data.classes == CLASSES
    assert numbers(data.test) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert (len(data.train), len(data.val)) == (11, 1)
    everything = [(label, i) for label in (0, 1) for i in range(6)]
    assert sorted(numbers(data.train) + numbers(data.val)) == everything


def test_val_alone_is_the_test_set(folder):
    (folder / "test").rename(folder / "val")
    data = load_folder(folder, 16)
    assert (len(data.train), len(data.val), len(data.test)) == (11, 1, 4)


def test_val_and_test_are_both_kept(folder):
    for name in CLASSES:
        paint(folder / "val" / name / "x.png", (9, 9, 9))
    data = load_folder(folder, 16)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 2, 4)
    assert numbers(data.val) == [(0, 9), (1, 9)]


def test_images_have_the_asked_or_the_default_size(folder):
    assert load_dataset(f"folder:{folder}").train.fetch(torch.tensor([0]))[0].shape == (1, 3, 224, 224)
    data = load_dataset(f"folder:{folder}", image_size=24, limit=3)
    images, labels = data.test.fetch(torch.tensor([2, 0]))
    assert data.image_size == 24
    assert images.shape == (2, 3, 24, 24)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0]
    assert data.test.fetch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 3, 24, 24)


def test_labels_and_images_move_together(folder):
    split = load_folder(folder, 16).test
    assert split.to("meta").device.type == "meta"
    assert numbers(split.subset(torch.tensor([3, 0]))) == [(1, 1), (0, 0)]
    assert numbers(split.gather(torch.tensor([3]), "cpu")) == [(1, 1)]


def test_nested_folders_other_files_and_hidden_files(folder):
    paint(folder / "test" / "ant" / "deep" / "z.JPG", (200, 50, 0))
    (folder / "test" / "ant" / "notes.txt").write_text("not an image")
    (folder / "test" / "ant" / "._0.png").write_text("resource fork")
    (folder / "test" / ".cache").mkdir()
    assert [label for label, _ in numbers(load_folder(folder, 16).test)] == [0, 1, 0, 1, 0]


def remove(folder, name):
    for path in sorted((folder / name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / name).rmdir()


@pytest.mark.parametrize(
    ("gone", "message"),
    [("train", "no train folder there"), ("test", "neither a val nor a test folder"), ("test/bee", "no folder for the class 'bee'")],
)
def test_missing_folders(folder, gone, message):
    remove(folder, gone)
    with pytest.raises(InputError, match=message) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)


def test_no_classes(folder):
    remove(folder, "train/ant")
    remove(folder, "train/bee")
    with pytest.raises(InputError, match="train: no class folders there"):
        load_folder(folder)


def test_a_class_that_train_does_not_know(folder):
    paint(folder / "test" / "wasp" / "0.png", (0, 0, 0))
    with pytest.raises(InputError, match="the class 'wasp' is not in train"):
        load_folder(folder)


def test_an_empty_class(folder):
    for path in (folder / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"train/bee: no images of this class \(\.png"):
        load_folder(folder)


def test_a_corrupt_image_is_named(folder):
    bad = folder / "test" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = load_folder(folder, 16)
    data.test.fetch(torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match=r"bee/1\.png: the image is damaged"):
        data.test.fetch(torch.arange(4))


def test_decoding_is_the_same_in_every_thread(folder):
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(folder / "train" / "ant" / f"{i}.png")
    split = load_folder(folder, 16).train
    rows = torch.arange(len(split)).repeat(3)
    together, _ = split.fetch(rows)
    one_by_one = torch.cat([split.fetch(row[None])[0] for row in rows])
    assert torch.equal(together, one_by_one)
