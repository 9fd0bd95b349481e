"""Threat models: the sets of images an attacker may choose from, given a clean image.

Every threat model also confines images to the unit box. ``project`` is the Euclidean projection onto
the set (exact, hence idempotent; for an l2 ball the intersection with the box is approached by a
ball projection followed by a clamp, which stays in both), ``contains`` is the test that every attack's
output must pass, ``sample`` draws a random member, for initialisation and as a noise baseline.

Budgets may be numbers or, for the balls and for pixel counts, tensors [B] with one budget per image;
``select`` keeps them aligned when finished images leave a batch. A budget may be ``math.inf``: any image at all.
"""

from amsdn.threats.norm_balls import L1Ball, L2Ball, LinfBall, NormBall, unit_length
from amsdn.threats.patches import PatchRectangles, PatchRegion, rectangle_mask, square_mask
from amsdn.threats.sparse import SparsePixels
from amsdn.threats.threat_model import TOLERANCE, ThreatModel, budget_on, changed_pixels

__all__ = [
    "TOLERANCE",
    "L1Ball",
    "L2Ball",
    "LinfBall",
    "NormBall",
    "PatchRectangles",
    "PatchRegion",
    "SparsePixels",
    "ThreatModel",
    "budget_on",
    "changed_pixels",
    "rectangle_mask",
    "square_mask",
    "unit_length",
]
