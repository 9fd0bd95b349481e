import pickle
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

from amsdn.data import load_dataset
from amsdn.errors import InputError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def offline(monkeypatch):
    """No test may reach for the network: every attempt fails as it does without one."""

    def refuse(*args, **kwargs):
        assert socket.getdefaulttimeout() is not None, "a download without a timeout can hang"
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.delenv("AMSDN_DATA", raising=False)


def test_array_layout_from_root(cifar_folder, offline):
    data = load_dataset("cifar10", root=cifar_folder)
    assert [len(s) for s in (data.train, data.val, data.test)] == [96, 4, 20]
    assert data.num_classes == 10
    stored = torch.from_numpy(np.load(cifar_folder / "train_images.npy")).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(data.train.fetch(torch.arange(96))[0], stored[:96])
    assert torch.equal(data.val.fetch(torch.arange(4))[0], stored[96:])


def test_array_layout_from_the_environment_and_root_first(cifar_folder, offline, monkeypatch, tmp_path):
    monkeypatch.setenv("AMSDN_DATA", str(cifar_folder))
    assert len(load_dataset("cifar10").test) == 20
    with pytest.raises(InputError, match="elsewhere"):
        load_dataset("cifar10", root=tmp_path / "elsewhere")


def test_an_incomplete_layout_is_not_taken_for_an_empty_folder(cifar_folder, offline):
    (cifar_folder / "test_labels.npy").unlink()
    with pytest.raises(InputError, match=r"test_labels\.npy: missing"):
        load_dataset("cifar10", root=cifar_folder)


def test_other_arrays_are_not_called_cifar10(array_folder, offline):
    with pytest.raises(InputError, match=f"2 classes at 8 px.*use arrays:{array_folder}"):
        load_dataset("cifar10", root=array_folder)


def test_offline_says_what_was_tried_and_both_remedies(tmp_path, offline):
    with pytest.raises(InputError) as error:
        load_dataset("cifar10", root=tmp_path)
    text = str(error.value)
    assert "\n" not in text
    for part in (str(tmp_path), "no route to host", "cifar-10-python.tar.gz there", "train_images.npy", "--data-root", "AMSDN_DATA"):
        assert part in text
    assert socket.getdefaulttimeout() is None


def test_a_folder_that_cannot_be_made(tmp_path, offline):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cifar10: "):
        load_dataset("cifar10", root=tmp_path / "file" / "below")


def test_batches_that_fail_the_digest_are_never_unpickled(tmp_path, offline):
    mark = tmp_path / "mark"

    class Explosive:
        def __reduce__(self):
            return Path.touch, (mark,)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Explosive()))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    with pytest.raises(InputError, match="downloading"):
        load_dataset("cifar10", root=tmp_path)
    assert not mark.exists()


def fake_official(counts):
    def make(root, train, download=False):
        n = counts["train" if train else "test"]
        return SimpleNamespace(data=np.zeros((n, 32, 32, 3), np.uint8), targets=[i % 10 for i in range(n)], classes=list("abcdefghij"))

    make.filename, make.url = "cifar-10-python.tar.gz", "https://example.invalid"
    return make


def test_official_counts_and_the_held_out_tail(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_official({"train": 50_000, "test": 10_000}))
    data = load_dataset("cifar10", root=tmp_path)
    assert [len(s) for s in (data.train, data.val, data.test)] == [48_000, 2_000, 10_000]
    assert data.val.labels.tolist() == [i % 10 for i in range(48_000, 50_000)]


def test_official_sets_of_another_size_are_refused(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_official({"train": 50_000, "test": 9}))
    with pytest.raises(InputError, match=r"the test set has shape \[9, 32, 32, 3\]"):
        load_dataset("cifar10", root=tmp_path)


@pytest.mark.skipif(not (SHARED / "unpack_cifar10.py").exists(), reason="the shared CIFAR-10 images are not on this machine")
def test_real_images_from_the_shared_script(tmp_path, offline):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    for name in ("train_000.webp", "test_000.webp"):
        found = next((SHARED / "cifar10").glob(f"?/{name}"))
        (source / "a" / name).symlink_to(found)
    for name in ("labels.npz", "sha256.json"):
        (source / name).symlink_to(SHARED / "cifar10" / name)
    command = [sys.executable, SHARED / "unpack_cifar10.py", tmp_path / "out", "--source", source]
    subprocess.run(command, check=True, capture_output=True)
    data = load_dataset("cifar10", root=tmp_path / "out")
    assert [len(s) for s in (data.train, data.val, data.test)] == [96, 4, 100]
    # The official test set starts: cat, ship, ship, airplane, frog, frog, automobile, frog, cat, automobile.
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert data.classes[3] == "cat"
    assert 0.3 < data.test.fetch(torch.arange(100))[0].mean() < 0.6
