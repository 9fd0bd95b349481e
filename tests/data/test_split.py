import pytest
import torch

from amsdn.data import ArraySplit, Dataset, Split, SubsetSplit
from amsdn.data.split import resized
from amsdn.errors import InputError


def array_split(n: int = 12, size: int = 8, classes: int = 3, seed: int = 0) -> ArraySplit:
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ArraySplit(images, torch.arange(n) // (n // classes))


def dataset() -> Dataset:
    return Dataset("toy", array_split(12), array_split(6, seed=1), array_split(9, seed=2), ("a", "b", "c"), 8)


def test_fetch_hands_out_exact_fractions_in_the_asked_order():
    split = array_split()
    images, labels = split.fetch(torch.tensor([7, 0, 7]))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(images, split.images[[7, 0, 7]].float() / 255)
    assert labels.tolist() == [1, 0, 1]
    assert images.is_contiguous()


def test_fetch_never_aliases_the_stored_images():
    split = array_split()
    before = split.images.clone()
    split.fetch(torch.arange(12))[0].zero_()
    assert torch.equal(split.images, before)


def test_channels_last_storage_gives_the_same_contiguous_batch():
    split = array_split()
    other = ArraySplit(split.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), split.labels)
    images = other.fetch(torch.arange(5))[0]
    assert images.is_contiguous()
    assert torch.equal(images, split.fetch(torch.arange(5))[0])


def test_subsets_compose():
    split = array_split()
    outer = split.subset(torch.tensor([10, 3, 5, 1]))
    inner = outer.subset(torch.tensor([2, 0]))
    assert (len(outer), len(inner)) == (4, 2)
    assert outer.labels.tolist() == split.labels[[10, 3, 5, 1]].tolist()
    assert torch.equal(inner.fetch(torch.tensor([0, 1]))[0], split.fetch(torch.tensor([5, 10]))[0])
    assert inner.base is split


def same(a: Split, b: Split) -> bool:
    rows = torch.arange(len(b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a.fetch(rows), b.fetch(rows), strict=True))


def test_gather_keeps_only_the_chosen_images():
    split = array_split()
    rows, inner = torch.tensor([10, 3, 5]), torch.tensor([2, 0])
    alone = split.subset(rows).gather(inner, "cpu")
    assert isinstance(alone, ArraySplit)
    assert len(alone.images) == 2
    assert same(alone, split.subset(torch.tensor([5, 10])))


def test_gather_of_a_split_without_stored_images_is_a_subset_of_it():
    class Computed(Split):
        def __init__(self) -> None:
            self.labels = torch.arange(4)

        def fetch(self, indices):
            return indices.float().reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 4, self.labels[indices]

        def to(self, device):
            return self

    assert isinstance(Computed().gather(torch.tensor([2]), "cpu"), SubsetSplit)
    assert same(Computed().gather(torch.tensor([2, 3]), "cpu"), Computed().subset(torch.tensor([2, 3])))


def test_to_a_device_moves_only_a_subsets_own_images():
    moved = array_split().subset(torch.tensor([4, 2])).to("meta")
    assert isinstance(moved, ArraySplit)
    assert moved.images.shape == (2, 3, 8, 8)
    assert moved.device.type == "meta"
    subset = array_split().subset(torch.tensor([4, 2]))
    assert subset.to("cpu") is subset


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_splits_on_a_gpu_agree_with_the_cpu():
    moved = dataset().to("cuda")
    for ours, theirs in ((moved.train, dataset().train), (moved.limited(4).train, dataset().limited(4).train)):
        images, labels = ours.fetch(torch.arange(3))
        assert images.device.type == labels.device.type == "cuda"
        assert torch.equal(images.cpu(), theirs.fetch(torch.arange(3))[0])


def test_array_split_refuses_other_types():
    split = array_split()
    with pytest.raises(AssertionError, match="not uint8"):
        ArraySplit(split.images.float(), split.labels)
    with pytest.raises(AssertionError, match="not int64"):
        ArraySplit(split.images, split.labels.int())
    with pytest.raises(AssertionError, match=r"\[5\] labels for 12"):
        ArraySplit(split.images, split.labels[:5])


def test_limited_keeps_test_order_and_balances_the_rest():
    whole = dataset()
    cut = whole.limited(4)
    assert same(cut.test, whole.test.subset(torch.arange(4)))
    assert torch.bincount(cut.train.labels).tolist() == [2, 1, 1]
    assert torch.bincount(cut.val.labels).sum() == 4
    assert same(cut.train, whole.limited(4).train)


def test_a_limit_above_the_size_changes_nothing():
    whole = dataset()
    cut = whole.limited(9)
    assert len(cut.train) == 9
    assert cut.val is whole.val
    assert cut.test is whole.test


def test_limit_must_leave_something():
    with pytest.raises(InputError, match="got 0"):
        dataset().limited(0)


def test_dataset_moves_every_split():
    moved = dataset().to("meta")
    assert {s.device.type for s in (moved.train, moved.val, moved.test)} == {"meta"}
    assert moved.num_classes == 3


def test_resized_keeps_constant_images_and_means():
    flat = ArraySplit(torch.full((3, 3, 16, 16), 77, dtype=torch.uint8), torch.arange(3))
    for size in (8, 16, 24):
        assert torch.equal(resized(flat, size).images, torch.full((3, 3, size, size), 77, dtype=torch.uint8))
    split = array_split(3, size=16)
    # Shrinking by two with an antialiased triangle keeps the mean up to what the border loses.
    assert (resized(split, 8).images.double().mean() - split.images.double().mean()).abs() < 6


def test_resizing_crosses_chunk_borders_in_order(monkeypatch):
    split = array_split(12)
    whole = resized(split, 10)
    monkeypatch.setattr("amsdn.data.split.RESIZE_CHUNK", 5)
    assert torch.equal(resized(split, 10).images, whole.images)
    assert torch.equal(whole.labels, split.labels)


def test_dataset_resized_to_its_own_size_is_itself():
    whole = dataset()
    assert whole.resized(8) is whole
    larger = whole.limited(3).resized(16)
    assert larger.image_size == 16
    assert larger.train.fetch(torch.arange(2))[0].shape == (2, 3, 16, 16)
