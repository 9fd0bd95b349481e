"""Sets of attacks that evaluation runs, by name.

Every threat family is attacked at several budgets, for the curves; at its headline budget both by
gradients through the whole defence and by random search, since each finds images that the other misses
(white-box attacks alone overestimate sparse robustness by up to 39 points; Zhong et al. 2024).
"""

from collections.abc import Mapping, Sequence

from amsdn.attacks import Attack, PatchPGD, PatchRS, PGDAttack, PGDL2Attack, Restarts, SparsePGD, SparseRS


def quick_suite(
    *, patches: Sequence[int], pixels: Sequence[int], headline: Mapping[str, float], steps: int, queries: int, starts: int
) -> dict[str, Attack]:
    """CPU-sized attacks for these patch sides and pixel counts, and for linf and l2 around their headline budgets.

    ``steps`` gradient steps for patches, twice as many for pixels, 20 for the balls; for the headline patch
    ``starts`` more random starts with larger steps; ``queries`` of random search for the patch and the pixel count of the headline.
    """
    suite: dict[str, Attack] = {}
    for size in patches:
        suite[f"patch-pgd-{size}"] = PatchPGD(size=size, num_steps=steps, move_every=2, candidates=8)
    side = int(headline["patch"])
    # One start is weak: places and contents are a landscape of many hills. Each start meets only what still stands.
    suite[f"patch-pgd-{side}-restarts"] = Restarts(PatchPGD(size=side, num_steps=steps, alpha=0.1, move_every=2), starts)
    suite[f"patch-rs-{side}"] = PatchRS(size=side, num_queries=queries)
    for k in pixels:
        suite[f"sparse-pgd-{k}"] = SparsePGD(k=k, num_steps=2 * steps)
    count = int(headline["sparse"])
    suite[f"sparse-rs-{count}"] = SparseRS(k=count, num_queries=queries)
    for share in (0.5, 1, 2):
        epsilon, radius = share * headline["linf"], share * headline["l2"]
        suite[f"pgd-{round(255 * epsilon)}"] = PGDAttack(epsilon=epsilon, alpha=epsilon / 4, num_steps=20)
        suite[f"pgd-l2-{radius:g}"] = PGDL2Attack(epsilon=radius, alpha=radius / 4, num_steps=20)
    return suite
