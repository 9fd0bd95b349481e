"""Sets of attacks that evaluation runs, by name.

Every threat family is attacked at several budgets, for the curves; at its headline budget by the CPU-sized standard cascade
of that threat, in which gradients and random search follow one another, since each finds images that the other misses
(white-box attacks alone overestimate sparse robustness by up to 39 points; Zhong et al. 2024). Patches and pixels are also
sought that the detector lets pass.
"""

from collections.abc import Mapping, Sequence

from amsdn.attacks import (
    APGDAttack,
    APGDL2Attack,
    APGDTargetedAttack,
    APGDTargetedL2Attack,
    Attack,
    Cascade,
    EvadeDetector,
    GuidedSparseRS,
    PatchAutoAttack,
    PatchPGD,
    PGDAttack,
    PGDL2Attack,
    SparseAutoAttack,
    SparsePGD,
)


def quick_suite(
    *, patches: Sequence[int], pixels: Sequence[int], headline: Mapping[str, float], steps: int, targets: int
) -> dict[str, Attack]:
    """CPU-sized attacks for these patch sides and pixel counts, and for linf and l2 around their headline budgets.

    ``steps`` gradient steps for patches and pixels, 20 for the balls; at the headline budgets the quick
    cascades, for balls APGD on cross-entropy, then targeted at the ``targets`` nearest classes.
    """
    suite: dict[str, Attack] = {}
    side, count, epsilon, radius = int(headline["patch"]), int(headline["sparse"]), headline["linf"], headline["l2"]
    for size in patches:
        suite[f"patch-pgd-{size}"] = PatchPGD.racing(size, steps)
    suite[f"patch-autoattack-{side}"] = PatchAutoAttack.quick(side)
    suite[f"patch-evading-{side}"] = EvadeDetector(PatchPGD.racing(side, 100))
    for k in pixels:
        suite[f"sparse-pgd-{k}"] = SparsePGD(k=k, num_steps=steps)
    suite[f"sparse-autoattack-{count}"] = SparseAutoAttack.quick(count)
    suite[f"sparse-evading-{count}"] = EvadeDetector(Cascade((SparsePGD(count, 100), GuidedSparseRS(count, 300))))
    suite[f"apgd-{round(255 * epsilon)}"] = Cascade((APGDAttack(epsilon, 20), APGDTargetedAttack(epsilon, 20, n_targets=targets)))
    suite[f"apgd-l2-{radius:g}"] = Cascade((APGDL2Attack(radius, 20), APGDTargetedL2Attack(radius, 20, n_targets=targets)))
    for share in (0.5, 2):
        suite[f"pgd-{round(255 * share * epsilon)}"] = PGDAttack(epsilon=share * epsilon, alpha=share * epsilon / 4, num_steps=20)
        suite[f"pgd-l2-{share * radius:g}"] = PGDL2Attack(epsilon=share * radius, alpha=share * radius / 4, num_steps=20)
    return suite
