"""A data set and a network small enough for a step to take milliseconds."""

import pytest
import torch

from amsdn.data import ArraySplit
from amsdn.models.amsdn import AMSDN, AMSDNConfig


@pytest.fixture(scope="session")
def tiny_split() -> ArraySplit:
    """Forty 16x16 images of two classes: dark and bright."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = (torch.rand(40, 3, 16, 16, generator=gen) * 100 + 120 * labels.reshape(-1, 1, 1, 1)).to(torch.uint8)
    return ArraySplit(images, labels)


@pytest.fixture
def tiny_config() -> AMSDNConfig:
    return AMSDNConfig(num_classes=2, variant="compact", width=2, fpn_channels=8)


@pytest.fixture
def tiny_model(tiny_config: AMSDNConfig) -> AMSDN:
    torch.manual_seed(0)
    return AMSDN.from_config(tiny_config)
