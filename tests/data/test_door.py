import pytest

from amsdn.data import load_dataset
from amsdn.errors import InputError


@pytest.mark.parametrize("name", ["mnist", "", "folder", "arrays:", "folder:", "digits:x", "CIFAR10"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(InputError, match=r"unknown data set .* choose one of digits, cifar10, folder:DIR, arrays:DIR"):
        load_dataset(name)


def test_unusable_sizes_and_limits():
    with pytest.raises(InputError, match="image size must be at least 8 px, got 0"):
        load_dataset("digits", image_size=0)
    with pytest.raises(InputError, match="limit must be at least 1"):
        load_dataset("digits", limit=0)
