"""What must hold of attacks' outcomes beside one another, image by image: more budget, more effort and better knowledge never break less.

All take which images stand (are answered right) under an attack, [N] bool, of the same images in the same order.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from scipy.special import bdtrc
from torch import Tensor

from amsdn.evaluation.reliability.finding import Finding

LEFT_WITHOUT_LIMIT = 0.02  # of images that may stand when the budget is all there is
REVIVED = 0.05  # of images that may stand under more budget than what broke them
MORE_EFFORT = 0.005  # of images that more steps or restarts may still break
SURE = 0.01  # significance at which the weaker of two attacks is said to have won


def falls_without_limit(standing: Tensor) -> Finding:
    """Nothing stands when the attack may change everything: an attack that cannot break that is not optimising."""
    left = float(standing.float().mean())
    told = f"{100 * left:.1f} % of images stand although the attack may change all of them: it does not optimise"
    return Finding("falls without limit", left <= LEFT_WITHOUT_LIMIT, left, LEFT_WITHOUT_LIMIT, told)


def falls_with_budget(curve: Mapping[float, Tensor]) -> Finding:
    """What a smaller budget broke, a larger one breaks too: ``curve`` is budget -> standing, for one attack."""
    worst, where = 0.0, ""
    budgets = sorted(curve)
    for small, large in pairwise(budgets):
        revived = float((curve[large] & ~curve[small]).float().mean())
        if revived > worst:
            worst, where = revived, f"{large:g} and not under {small:g}"
    told = f"{100 * worst:.1f} % of images stand under a budget of {where}: the attack loses its way"
    return Finding("falls with budget", worst <= REVIVED, worst, REVIVED, told)


def stronger_wins(check: str, stronger: Tensor, weaker: Tensor, told: str) -> Finding:
    """The attack that should be stronger is not beaten by the weaker, by the images that only one of them breaks (exact McNemar test).

    Gradients against queries, many steps against one, an attack against random noise; ``told`` says what a failure means.
    """
    only_weaker = int((stronger & ~weaker).sum())
    only_stronger = int((weaker & ~stronger).sum())
    apart = only_weaker + only_stronger
    p = float(bdtrc(only_weaker - 1, apart, 0.5))  # 1 where they never differ
    return Finding(check, p >= SURE, p, SURE, f"{told} (alone broken by the weaker {only_weaker}, by the stronger {only_stronger})")


def effort_is_enough(standing: Tensor, with_more: Tensor) -> Finding:
    """More steps or restarts hardly break more: at most half a point, or one image of few."""
    broken = int((standing & ~with_more).sum())
    share = broken / max(len(standing), 1)
    told = f"more steps and restarts break another {100 * share:.1f} % of images: the attack had not converged"
    return Finding("effort is enough", share <= MORE_EFFORT or broken <= 1, share, MORE_EFFORT, told)


def transfers(fooled_surrogate: Tensor, fooled_model: Tensor, least: float = 0.5) -> Finding:
    """Where the surrogate that lends its gradients is fooled, mostly the model is as well."""
    count = int(fooled_surrogate.sum())
    share = float((fooled_surrogate & fooled_model).sum()) / count if count else 1.0
    told = (
        f"of {count} images on which the surrogate is fooled, the model itself is on {100 * share:.0f} %: its gradients are not the model's"
    )
    return Finding("transfers", share >= least, share, least, told)


def standing(correct: list[bool]) -> Tensor:
    """Rows' ``correct`` as a tensor."""
    return torch.tensor(correct, dtype=torch.bool)
