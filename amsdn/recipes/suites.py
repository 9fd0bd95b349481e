"""Sets of attacks that evaluation runs, by name.

Every threat family is attacked at several budgets, for the curves; at its headline budget both by
gradients through the whole defence and by random search, since each finds images that the other misses
(FIELD.md section 3: white-box attacks alone overestimate sparse robustness by up to 39 points).
"""

from collections.abc import Mapping

from amsdn.attacks import Attack, PatchPGD, PatchRS, PGDAttack, PGDL2Attack, SparsePGD, SparseRS

HEADLINE: Mapping[str, float] = {"patch": 5, "sparse": 10, "linf": 4 / 255, "l2": 0.5}


def quick_suite(*, steps: int = 40, queries: int = 1000) -> dict[str, Attack]:
    """CPU-sized: ``steps`` gradient steps for patches, twice as many for pixels, ``queries`` for random search."""
    suite: dict[str, Attack] = {}
    for size in (2, 3, 5, 8):
        suite[f"patch-pgd-{size}"] = PatchPGD(size=size, num_steps=steps)
    for k in (1, 5, 10, 20):
        suite[f"sparse-pgd-{k}"] = SparsePGD(k=k, num_steps=2 * steps)
    suite["patch-rs-5"] = PatchRS(size=5, num_queries=queries)
    for k in (5, 10, 20):
        suite[f"sparse-rs-{k}"] = SparseRS(k=k, num_queries=queries)
    for numerator in (2, 4, 8):
        suite[f"pgd-{numerator}"] = PGDAttack(epsilon=numerator / 255, alpha=numerator / 255 / 4, num_steps=20)
    for radius in (0.25, 0.5, 1.0):
        suite[f"pgd-l2-{radius:g}"] = PGDL2Attack(epsilon=radius, alpha=radius / 4, num_steps=20)
    return suite
