"""A run-off between voters, and how many of them an adversary must change to change its outcome.

Every voter has logits over the classes. First round: each votes for its largest logit, and the two classes with most votes go on.
Second round: each votes for the one of these two whose logit is larger, and the class with more votes is the answer. All ties go to
the smaller index. A voter whose logits are not all finite votes for nobody.

The rule is that of Rezaei, Banihashem, Chegini & Feizi ("Run-Off Election", ICML 2023), which Hammoudeh & Lowd (AAAI 2024) use
over disjoint features. The rule and the bound below belong together: a defence by votes and its certificate take both from here.
"""

import torch
from torch import Tensor

NO_VOTE = -1


def cast_votes(logits: Tensor) -> Tensor:
    """The first-round votes int64 [...] of voters with logits [...,K]; ``NO_VOTE`` where any logit is not finite.

    An argmax over NaN would otherwise be a vote for wherever the NaN stands.
    """
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), NO_VOTE)


def firm_votes(logits: Tensor, tolerance: float) -> Tensor:
    """As ``cast_votes``, but ``NO_VOTE`` also where the two largest logits are within ``tolerance`` of each other.

    ``tolerance`` is relative to the voter's largest absolute logit. Networks round differently in batches of other sizes; what
    is left here is what rounding within half of the tolerance a logit cannot change.
    """
    assert logits.shape[-1] > 1, "a vote needs at least two classes"
    top = logits.topk(2, dim=-1).values
    return torch.where(top[..., 0] - top[..., 1] > tolerance * logits.abs().amax(-1), cast_votes(logits), NO_VOTE)


def count_votes(votes: Tensor, classes: int) -> Tensor:
    """How many of the votes [B,T] each class has, int64 [B,K]; ``NO_VOTE`` counts for none."""
    counts = torch.zeros(len(votes), classes + 1, dtype=torch.int64, device=votes.device)
    return counts.scatter_add_(1, votes + 1, torch.ones_like(votes))[:, 1:]


def run_off(logits: Tensor) -> Tensor:
    """The answers int64 [B] of T voters each, with logits [B,T,K] of at least two classes."""
    votes = cast_votes(logits)
    first, second = _two_highest(count_votes(votes, logits.shape[2])).unbind(1)
    low, high = (
        logits.gather(2, c[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)
        for c in (torch.minimum(first, second), torch.maximum(first, second))
    )
    usable = votes != NO_VOTE
    lead = ((low >= high) & usable).sum(1) - ((low < high) & usable).sum(1)
    return torch.where(lead >= 0, torch.minimum(first, second), torch.maximum(first, second))


def changes_survived(logits: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """(answer, radius) int64 [B] for logits [B,T,K]: no change of any ``radius`` of the T voters changes the answer.

    Voters that are not finite, or within ``tolerance`` of undecided (see ``firm_votes``), are counted as the adversary's besides, in
    each round: they are held to vote as harmfully as they can, at no cost. The radius is -1 where not even the unchanged answer is
    sure then.

    Proof. Let y be the answer, n the counts of firm first-round votes, u the number of voters without one, and [.] be 1 or 0.
    Class c passes class s in a round when its votes exceed those of s, or equal them if c < s. After m changes, s has at least
    n_s - m votes and c at most n_c + u + m. So for c to pass s, 2m >= g(c, s) = n_s - n_c - u + [s < c], and the same holds in the
    second round with the firm preferences between the two in the place of n and those undecided in the place of u.
    An adversary who changes the answer must do one of two things.

    - Keep y out of the second round: two rivals b and c pass y. A change that turns a vote for y takes 2 from one of g(b, y) and
      g(c, y) and 1 from the other, and no change takes more; so 2m is at least the larger of them, and 3m their sum (with negative
      ones taken as 0). The rivals with the two smallest g need the fewest changes.
    - Have some rival c in the second round pass y there, which needs 2m >= g(c, y) of that round. For c to be there beside y, it has to
      pass every other class in the first round, so that 2m >= g(c, s) for the s with most votes of those (smallest index of several).

    The radius is one less than the fewest m that meets these. The first part and the structure are Rezaei et al.'s.
    Deviations: undecided voters; and in the second part the rival passes the strongest other class rather than the old finalist,
    which is at least as strong a condition.
    """
    answer, voters, classes = run_off(logits), logits.shape[1], logits.shape[2]
    index, y = torch.arange(classes, device=logits.device), answer[:, None]
    votes = firm_votes(logits, tolerance)
    counts, free = count_votes(votes, classes), (votes == NO_VOTE).sum(1, keepdim=True)
    beyond = 4 * voters + 4  # more than any gap, and needing more changes than there are voters

    passing_y = (counts.gather(1, y) - counts - free + (y < index)).clamp_min(0).scatter(1, y, beyond)
    nearest = passing_y.topk(2, largest=False).values
    ousting = torch.maximum(_share(nearest[:, 1], 2), _share(nearest.sum(1), 3))

    others = counts.scatter(1, y, -beyond)
    most, strongest = others.amax(1, keepdim=True), others.argmax(1, keepdim=True)  # itself passes the rest without a change
    entering = (most - counts - free + (strongest < index)).clamp_min(0)
    winning = (_second_round_lead(logits, answer, tolerance) + (y < index)).clamp_min(0)
    beating = _share(torch.maximum(entering, winning), 2).scatter(1, y, beyond)
    return answer, torch.minimum(ousting, beating.amin(1)) - 1


def _two_highest(counts: Tensor) -> Tensor:
    """The two classes of most votes [B,2] by counts [B,K]: of equal ones, the smaller index first."""
    first = counts.argmax(1, keepdim=True)
    second = counts.scatter(1, first, torch.iinfo(torch.int64).min).argmax(1, keepdim=True)
    return torch.cat([first, second], 1)


def _second_round_lead(logits: Tensor, answer: Tensor, tolerance: float) -> Tensor:
    """Voters who firmly prefer the answer [B] to each class, less all others, int64 [B,K]; logits [B,T,K]."""
    ahead = logits.gather(2, answer[:, None, None].expand(-1, logits.shape[1], 1)) - logits
    firm = ahead > tolerance * logits.abs().amax(2, keepdim=True)  # false of NaN
    return 2 * firm.sum(1) - logits.shape[1]


def _share(gap: Tensor, by: int) -> Tensor:
    """How many changes close a gap by ``by`` votes each: the quotient, rounded up."""
    return (gap + by - 1).div(by, rounding_mode="floor")
