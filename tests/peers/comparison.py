"""Is our attack weaker than a peer's? Decided per image, on the same images, threat and budget."""

import torch
from scipy.stats import binomtest
from torch import Tensor

from amsdn.attacks import Attack
from amsdn.records import config_hash
from amsdn.threats import ThreatModel

ALPHA = 0.01  # of the one-sided exact sign test on the images where only one of the two succeeds
BOUND = 0.03  # by how much ours may fall short of a peer's in the sample itself
# The same where both search at random: 10 to 14 of 100 images are then fooled by one search only, by luck. Were the two equal, the
# difference over the 182 images that Square is compared on would have a standard deviation of (0.12 / 182)^0.5 = 2.6 %. The bound
# is two of them, which one comparison of equals in 40 exceeds; 3 % would refuse one in 8. What is smaller takes more images.
RANDOM_BOUND = 0.05


_MADE: dict[tuple[object, ...], Tensor] = {}


def ours(attack: Attack, target) -> Tensor:
    """Our images, through the public call, from seed 0; made once for all the libraries they are compared with."""
    key = config_hash(attack), id(target.model), len(target.x)
    if key not in _MADE:
        _MADE[key] = attack(target.model, target.x, target.y).x_adv
    return _MADE[key]


def fooled(target, x_adv: Tensor, threat: ThreatModel | None = None) -> Tensor:
    """Which images [N] are misclassified; outside ``threat`` none counts."""
    with torch.no_grad():
        wrong = target.model(x_adv).argmax(1) != target.y
    return wrong if threat is None else wrong & threat.contains(x_adv.clamp(0, 1), target.x)


def assert_no_weaker(target, mine: Tensor, theirs: Tensor, threat: ThreatModel, bound: float = BOUND) -> None:
    """Fail if the peer's images fool the model where ours do not, significantly or by more than ``bound``.

    For random searches ``bound`` is RANDOM_BOUND.

    The peer must leave something to be found and have found something: otherwise the budget is too large or too small
    for the two to differ, and the comparison says nothing.
    """
    a, b = fooled(target, mine, threat), fooled(target, theirs, threat)
    n, only_theirs, only_ours = len(a), int((b & ~a).sum()), int((a & ~b).sum())
    text = f"of {n}: ours fools {int(a.sum())}, theirs {int(b.sum())}; only theirs {only_theirs}, only ours {only_ours}"
    print(text)
    assert 0.1 <= b.float().mean() <= 0.95, f"a budget that tells nothing: {text}"
    _judge(only_theirs, only_ours, n, text, bound)


def assert_no_farther(target, mine: Tensor, theirs: Tensor, distance, slack: float = 0.01) -> None:
    """The same for attacks that look for the nearest image: by the distance [N] of (x_adv, x), infinite where nothing is fooled.

    Differences below ``slack`` of the distance are ties, and our median may not exceed theirs by more than ``BOUND``.
    """
    a, b = (torch.where(fooled(target, x_adv), distance(x_adv, target.x), torch.inf) for x_adv in (mine, theirs))
    nearer, farther = int((a * (1 + slack) < b).sum()), int((a > b * (1 + slack)).sum())
    text = f"of {len(a)}: median {a.median():.4g} against {b.median():.4g}; ours nearer {nearer}, farther {farther}"
    print(text)
    assert fooled(target, theirs).float().mean() >= 0.5, f"the peer finds hardly anything: {text}"
    assert a.median() <= b.median() * (1 + BOUND), text
    p = binomtest(farther, farther + nearer, alternative="greater").pvalue if farther else 1.0
    assert p >= ALPHA, f"farther than the peer, p = {p:.2g}: {text}"


def _judge(only_theirs: int, only_ours: int, n: int, text: str, bound: float) -> None:
    p = binomtest(only_theirs, only_theirs + only_ours, alternative="greater").pvalue if only_theirs else 1.0
    assert p >= ALPHA, f"weaker than the peer, p = {p:.2g}: {text}"
    assert only_theirs - only_ours <= bound * n, f"weaker than the peer by more than {bound:.0%}: {text}"


def length(x_adv: Tensor, x: Tensor) -> Tensor:
    """Euclidean, [N]."""
    return (x_adv - x).flatten(1).norm(dim=1)


def pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """Pixels that differ in any channel, [N]."""
    return (x_adv != x).any(1).flatten(1).sum(1).float()
