"""Votes over disjoint pixels: what each grid answers, certifies and costs."""

from statistics import median
from typing import Any

from certificate_bench import Bench, certified, mean_of

from amsdn.evaluation.l0_certificate import L0Certifier
from amsdn.evaluation.statistics import share
from amsdn.models.pixel_partition import PixelPartition

RADII = (1, 2, 4, 8)


def measure(bench: Bench, grids: list[int]) -> list[dict[str, Any]]:
    """One line for each grid of so many parts a side. The median radius counts images that are not answered rightly, or not surely, as -1."""
    lines = []
    for side in grids:
        rows = certified(bench, f"l0-{side}", L0Certifier(PixelPartition(bench.model, side, side, views_per_pass=bench.batch_size)))
        lines.append(
            {
                "grid": f"{side}x{side}",
                "images": len(rows),
                "accuracy": share([r.correct for r in rows]).as_dict(),
                "median": median(r.radius if r.correct else -1 for r in rows),
                "certified": {str(k): share([r.correct and r.radius >= k for r in rows]).as_dict() for k in RADII},
                "passes": mean_of([r.samples for r in rows]),
                "seconds_per_image": sum(r.seconds for r in rows) / len(rows),
            }
        )
    return lines
