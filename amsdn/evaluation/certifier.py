"""What a certificate is, and what produces one: the seam between the three methods and the engine that runs them.

A certifier judges a *certified classifier* built around a base classifier: Gaussian smoothing (l2), double masking (patch),
votes over disjoint pixels (l0). It sees images, never labels, so that what it claims is what a user of the model would get.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

ABSTAIN = -1
KINDS = ("l2", "patch", "patch-detection", "l0")
"""The certificates there are, in the order in which tables show them."""


class Sample(NamedTuple):
    """One image to certify, [3,H,W] in [0,1] on the base classifier's device."""

    sample_id: int
    image: Tensor


class Claim(NamedTuple):
    """No image within ``radius`` of this one (in the unit of the certificate) changes the certified classifier's answer.

    ``prediction`` is that answer, or ``ABSTAIN``; with radius 0 nothing is claimed of other images.
    """

    prediction: int
    radius: float
    samples: int  # forward passes of the base classifier spent on this claim
    seconds: float  # its share of the wall time


class Certifier(ABC):
    """Turns samples into claims. One object is one configuration of one method around one base classifier."""

    kinds: tuple[str, ...]
    """The certificates made for every sample, by the names that records and ``crosscheck.CLAIMS`` use."""

    config: Any
    """A frozen dataclass that, with the model and the data, determines every claim (but for ``seconds``)."""

    model: nn.Module
    """The base classifier."""

    seed: int = 0
    """Of the claims' randomness; part of the records' key."""

    @abstractmethod
    def certify(self, samples: Iterator[Sample]) -> Iterator[tuple[int, Mapping[str, Claim]]]:
        """Pull samples as there is room for them, yield each one's id and claims by kind as soon as they are known.

        The order of the results is free. What is claimed of a sample does not depend on the samples pulled beside it,
        which is what lets a run be killed, resumed and split into shards.
        """
