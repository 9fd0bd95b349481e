"""The best published numbers for the threats of the report's headline table: CIFAR-10's test images, no extra training data.

They stand beside a row only where data and threat are the same. Networks, training and the attacks behind an empirical number differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

DATA, IMAGE_SIZE = "cifar10", 32
RECALLED = ", from memory"


@dataclass(frozen=True)
class Bar:
    """One published number; ``key`` is that of the row without its budget."""

    key: str  # "worst:" and a threat family, "certified:" or "median:" and a certificate
    budget: float  # in the threat's unit; 0 for a median radius
    value: float  # per cent of images; for a median, a radius in the threat's unit
    clean: float | None  # per cent right without an attack, where the source says
    who: str
    recalled: bool = False  # quoted from memory, not yet held against the paper

    def __str__(self) -> str:
        kind, threat = self.key.split(":")
        unit = {"worst": " robust", "certified": " certified"}.get(kind, " pixels" if threat == "l0" else "")
        clean = "" if self.clean is None else f" / {self.clean:g} clean"
        return f"best published: {self.value:g}{unit}{clean}, {self.who}{RECALLED if self.recalled else ''}"


BARS = (
    Bar("certified:patch", 5, 60, 86, "BagCert 2021"),
    Bar("certified:patch", 2, 72.9, 86.0, "BagCert 2021", recalled=True),
    Bar("worst:patch", 8, 55, None, "Rao et al. 2020, off centre", recalled=True),
    Bar("worst:sparse", 20, 78.6, None, "Fast-LS-ℓ₀ 2025, ConvNeXt-T"),
    Bar("worst:linf", 8 / 255, 58.1, None, "RobustBench, any size"),
    Bar("certified:l2", 0.25, 73.6, None, "SmoothAdv 2019"),
    Bar("certified:l2", 0.5, 59.3, None, "Sun et al. 2025"),
    Bar("certified:l2", 0.75, 48.3, None, "Sun et al. 2025"),
    Bar("median:l0", 0, 13, None, "FPA 2024"),
)


def published(key: str, budget: float, data: Mapping[str, Any] | None) -> str:
    """What to beat at exactly this threat, in words; nothing where there is no bar, or ``data`` (run.json's) is not what it was set on."""
    about = data or {}
    if about.get("name") != DATA or about.get("split", "test") != "test" or about.get("image_size", IMAGE_SIZE) != IMAGE_SIZE:
        return ""
    return next((str(bar) for bar in BARS if bar.key == key and isclose(bar.budget, budget, rel_tol=1e-6)), "")
