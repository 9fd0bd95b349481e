"""What attacks a model that only answers: for each threat the search that needs no gradients."""

from collections.abc import Iterable

from amsdn.attacks.base import Attack
from amsdn.attacks.patch_search import PatchRS
from amsdn.attacks.search_attacks import SparseRS
from amsdn.attacks.square_attack import SquareAttack, SquareL2Attack
from amsdn.threats import L2Ball, LinfBall, PatchRectangles, PatchRegion, SparsePixels, ThreatModel

QUERIES = 1000  # a search of so many is what a CPU does with a small network; the papers' is 5,000 to 10,000


def search_within(threat: ThreatModel, num_queries: int = QUERIES) -> Attack | None:
    """The search for members of ``threat``, or None where we have none (l1 balls, or a budget without end)."""
    if not threat.bounded:
        return None
    match threat:
        case PatchRegion():
            return PatchRS(threat.size, num_queries)
        case PatchRectangles():
            return PatchRS((threat.height, threat.width), num_queries, count=threat.count)
        case SparsePixels():
            return SparseRS(threat.k, num_queries)  # type: ignore[arg-type]
        case LinfBall():
            return SquareAttack(threat.eps, num_queries)  # type: ignore[arg-type]
        case L2Ball():
            return SquareL2Attack(threat.eps, num_queries)  # type: ignore[arg-type]
    return None


def searches(threats: Iterable[ThreatModel], num_queries: int = QUERIES) -> dict[str, Attack]:
    """``search_within`` for each of the threats, once, by names such as ``search-patch-5`` and ``search-linf-8-255``."""
    found = {_name(threat): search_within(threat, num_queries) for threat in threats}
    return {name: attack for name, attack in found.items() if attack is not None}


def _name(threat: ThreatModel) -> str:
    """The threat as part of a file name."""
    return "search-" + threat.describe().replace(" ", "-").replace("/", "-")
