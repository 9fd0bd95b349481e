"""The certified classifiers of a recipe: how they are put around a model, and how hard they are attacked.

Each is a plain description, so that it can be a field of a recipe, a flag of a command, and part of a run's record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from amsdn.attacks import Attack, GuidedSparseRS, MaskingAwarePatch, PatchPGD, SparsePGD
from amsdn.attacks.patch_attacks import Size, sides
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.models.double_masking import ChallengerMasking
from amsdn.models.pixel_partition import PixelPartition
from amsdn.protocols import mask_fill_of


@dataclass(frozen=True)
class PatchDefence:
    """Double masking against one patch. The mask set should be one that the model was trained with."""

    size: Size = 5  # side of the patch, or its height and width, in pixels
    masks_per_axis: int = 6  # 6: small masks, up to 666 pairs; 3: large masks, up to 45
    coarser: tuple[int, ...] = (2,)  # masks around 2 x 2 others are asked first, and stand for these where confident; none: no such masks
    confidence: float = 0.8  # the probability from which they do
    views_per_pass: int = 256  # masked images in memory at once

    def around(self, model: nn.Module) -> ChallengerMasking:
        """The certified classifier; covered pixels take the colour that the model declares."""
        more: dict[str, Any] = {"coarser": self.coarser, "confidence": self.confidence, "views_per_pass": self.views_per_pass}
        if isinstance(model, AMSDN):
            return model.verified(self.size, self.masks_per_axis, **more)
        return ChallengerMasking(model, self.size, self.masks_per_axis, mask_fill_of(model), **more)


@dataclass(frozen=True)
class PixelDefence:
    """Votes over rows x columns disjoint sets of pixels."""

    rows: int = 6
    columns: int = 6
    views_per_pass: int = 256  # partial images in memory at once

    def around(self, model: nn.Module) -> PixelPartition:
        """The certified classifier."""
        return PixelPartition(model, self.rows, self.columns, views_per_pass=self.views_per_pass)


@dataclass(frozen=True)
class DefenceAttacks:
    """How the certified classifiers are attacked; every query of theirs costs as many passes as they have views."""

    samples: int = 20  # of the certified images
    steps: int = 20  # of gradient attacks
    queries: int = 60  # of random search
    pixels: tuple[int, ...] = (2, 4, 8)  # budgets against the pixel votes

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"attacks: samples must be at least 1, got {self.samples}")

    def on_patches(self, size: Size) -> Mapping[str, Attack]:
        """Gradients through the mean over masks, and the attack that knows the masks; by the largest square that is certified."""
        side = min(sides(size))
        return {
            f"patch-pgd-{side}": PatchPGD(side, self.steps),
            f"masking-aware-{side}": MaskingAwarePatch(side, self.steps, majority_places=4, confirming_places=1),
        }

    def on_pixels(self) -> Mapping[str, Attack]:
        """Gradients through the mean over parts, and random search on the votes."""
        suite: dict[str, Attack] = {}
        for k in self.pixels:
            suite[f"sparse-pgd-{k}"] = SparsePGD(k, self.steps)
            suite[f"guided-sparse-rs-{k}"] = GuidedSparseRS(k, self.queries)
        return suite
