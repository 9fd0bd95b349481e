"""Classifiers: the AMSDN, its stages, and how they are stored."""

from amsdn.models.amsdn import AMSDN, AMSDNAnalysis, AMSDNConfig, AMSDNTrace
from amsdn.models.backbone.convnext_fpn import VARIANTS, build_backbone
from amsdn.models.normalize import Normalize
from amsdn.models.storage import load_model, save_model

__all__ = ["AMSDN", "VARIANTS", "AMSDNAnalysis", "AMSDNConfig", "AMSDNTrace", "Normalize", "build_backbone", "load_model", "save_model"]
