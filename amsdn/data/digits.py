"""Handwritten digits that ship inside scikit-learn: real images, ten classes, no download.

The source is the test part of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak,
1998): 1,797 grey images of 8x8 pixels with values 0 to 16.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits as load_source

from amsdn.data.sampling import stratified_order
from amsdn.data.split import ArraySplit, Dataset

IMAGE_SIZE = 32
TEST, VAL = 400, 200  # the other 1,197 are the training set
SPLIT_SEED = 1797


def load_digits() -> Dataset:
    """The digits as 32x32 RGB in a fixed stratified split: 1,197 train, 200 val, 400 test; classes "0" to "9"."""
    source = load_source()
    grey = torch.from_numpy(source.images).float().div(16).unsqueeze(1)
    large = F.interpolate(grey, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=False, align_corners=False)
    images = large.mul(255).round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(source.target).long()
    order = stratified_order(labels, torch.Generator().manual_seed(SPLIT_SEED))
    whole = ArraySplit(images, labels)
    return Dataset(
        name="digits",
        train=whole.gather(order[TEST + VAL :], "cpu"),
        val=whole.gather(order[TEST : TEST + VAL], "cpu"),
        test=whole.gather(order[:TEST], "cpu"),
        classes=tuple("0123456789"),
        image_size=IMAGE_SIZE,
    )
