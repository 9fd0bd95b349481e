"""Classifiers: the AMSDN, its stages, and how they are stored.

Names are imported on first use, so that ``python -m amsdn.models.amsdn`` and its siblings run their module once, not twice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amsdn.models.amsdn import AMSDN, AMSDNAnalysis, AMSDNConfig, AMSDNTrace
    from amsdn.models.backbone.convnext_fpn import VARIANTS, build_backbone
    from amsdn.models.normalize import Normalize
    from amsdn.models.storage import load_model, save_model

__all__ = ["AMSDN", "VARIANTS", "AMSDNAnalysis", "AMSDNConfig", "AMSDNTrace", "Normalize", "build_backbone", "load_model", "save_model"]

_HOMES = {
    "amsdn": ("AMSDN", "AMSDNAnalysis", "AMSDNConfig", "AMSDNTrace"),
    "backbone.convnext_fpn": ("VARIANTS", "build_backbone"),
    "normalize": ("Normalize",),
    "storage": ("load_model", "save_model"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
