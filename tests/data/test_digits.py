import hashlib

import pytest
import torch
from sklearn.datasets import load_digits as load_source

from amsdn.data import load_dataset
from amsdn.data.digits import load_digits


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_sizes_and_classes(digits):
    assert [len(s) for s in (digits.train, digits.val, digits.test)] == [1197, 200, 400]
    assert digits.classes == tuple("0123456789")
    assert digits.image_size == 32
    assert digits.test.fetch(torch.arange(3))[0].shape == (3, 3, 32, 32)


def test_the_split_is_stratified_and_shares_no_image(digits):
    source = torch.bincount(torch.from_numpy(load_source().target))
    for split in (digits.train, digits.val, digits.test):
        assert (torch.bincount(split.labels) - source * len(split) / 1797).abs().max() < 2
    together = torch.cat([s.images for s in (digits.train, digits.val, digits.test)]).flatten(1)
    assert len(together) == 1797
    # The source itself has no two equal images, so overlap would show as a repeated row.
    assert len(together.unique(dim=0)) == 1797


def test_images_are_grey_and_their_blocks_average_to_the_source(digits):
    images, labels = digits.train.fetch(torch.arange(50))
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    source = load_source()
    tiny = torch.from_numpy(source.images).float() / 16
    # Upsampling by four only smooths a block's mean towards its neighbours, so the nearest source image is the sample's own.
    blocks = torch.nn.functional.avg_pool2d(images[:, :1], 4).flatten(1)
    nearest = torch.cdist(blocks, tiny.flatten(1)).argmin(1)
    assert torch.equal(torch.from_numpy(source.target).long()[nearest], labels)


def test_the_split_is_the_published_one(digits):
    """Records name samples by index: a changed order would silently make old runs speak of other images."""
    order = torch.cat([digits.train.labels, digits.val.labels, digits.test.labels])
    assert hashlib.sha256(bytes(order.tolist())).hexdigest()[:16] == "8b54b2a508efec5e"


def test_through_the_door_with_limit_and_size():
    small = load_dataset("digits", limit=20, image_size=16)
    assert [len(s) for s in (small.train, small.val, small.test)] == [20, 20, 20]
    assert torch.bincount(small.train.labels).tolist() == [2] * 10
    assert small.image_size == 16
