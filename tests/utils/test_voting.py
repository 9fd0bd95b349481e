"""The run-off and its bound against every adversary on every small electorate.

A voter is a tuple of levels, one for each class: the higher, the better liked. Equal levels are what rounding decides. None is a voter
whose logits are not finite.
"""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from amsdn.utils.voting import NO_VOTE, cast_votes, changes_survived, count_votes, firm_votes, run_off

TOLERANCE = 1e-3
Voter = tuple[int, ...] | None


def voters(classes: int) -> list[Voter]:
    """Every way to like the classes, with ties and without, and None."""
    levels = itertools.product(range(classes), repeat=classes)
    return [*(v for v in levels if set(v) == set(range(max(v) + 1))), None]


def decided(classes: int) -> list[Voter]:
    return [v for v in voters(classes) if v is None or len(set(v)) == classes]


def transcribed(electorate: Sequence[Voter], classes: int) -> int:
    """The run-off of decided voters, rule by rule."""
    voting = [v for v in electorate if v is not None]
    votes = [v.index(max(v)) for v in voting]
    a, b = sorted(sorted(range(classes), key=lambda c: (-votes.count(c), c))[:2])
    return a if sum(v[a] > v[b] for v in voting) >= sum(v[b] > v[a] for v in voting) else b


def logits_of(electorates: Sequence[Sequence[Voter]], classes: int) -> Tensor:
    """[N,T,K], ties within the tolerance and broken at random."""
    rows = [[[math.nan] * classes if v is None else [1 + level for level in v] for v in e] for e in electorates]
    logits = torch.tensor(rows, dtype=torch.float32)
    return logits + 1e-4 * torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))


def sampled(classes: int, size: int, most: int) -> list[list[Voter]]:
    """Every electorate, or ``most`` random ones, half of them without undecided voters."""
    if len(voters(classes)) ** size <= most:
        return [list(e) for e in itertools.product(voters(classes), repeat=size)]
    draws = torch.Generator().manual_seed(1)
    kinds = [voters(classes), [v for v in decided(classes) if v is not None]]
    picked = torch.rand(most, size, generator=draws)
    return [[kinds[i % 2][int(p * len(kinds[i % 2]))] for p in row] for i, row in enumerate(picked.tolist())]


def fewest_changes(electorates: list[list[Voter]], claimed: Tensor, classes: int) -> Tensor:
    """How few voters must be changed for another answer than the one claimed, if rounding is on the adversary's side."""
    size, ends = len(electorates[0]), decided(classes)
    results = torch.tensor([transcribed(e, classes) for e in itertools.product(ends, repeat=size)])
    index = {v: i for i, v in enumerate(voters(classes))}
    cost = torch.tensor([[_cost(v, end) for end in ends] for v in voters(classes)], dtype=torch.int8)
    total = torch.zeros(len(electorates), 1, dtype=torch.int8)
    for position in range(size):  # grows to [N, ends ** size], in the order of itertools.product
        own = cost[torch.tensor([index[e[position]] for e in electorates])]
        total = (total[:, :, None] + own[:, None, :]).flatten(1)
    return torch.where(results == claimed[:, None], torch.tensor(99, dtype=torch.int8), total).amin(1).long()


def _cost(voter: Voter, end: Voter) -> int:
    """0 where rounding alone makes ``end`` of the voter."""
    if voter is None or end is None:
        return int(voter is not None)
    pairs = itertools.permutations(range(len(voter)), 2)
    return int(any(voter[a] > voter[b] and end[a] < end[b] for a, b in pairs))


ELECTORATES = [(2, 1, 9999), (2, 6, 9999), (3, 1, 9999), (3, 2, 9999), (3, 3, 9999), (3, 4, 2000), (3, 5, 400), (4, 3, 400)]


@pytest.mark.parametrize(("classes", "size", "most"), ELECTORATES)
def test_no_adversary_changes_the_answer_within_the_radius(classes: int, size: int, most: int) -> None:
    electorates = sampled(classes, size, most)
    answer, radius = changes_survived(logits_of(electorates, classes), TOLERANCE)
    limit = fewest_changes(electorates, answer, classes) - 1
    assert bool((radius <= limit).all())
    assert bool((radius >= -1).all())
    if classes == 2:
        assert torch.equal(radius, limit)
    sure = torch.tensor([all(v is not None and len(set(v)) == classes for v in e) for e in electorates])
    assert float((radius == limit)[sure].float().mean()) > 0.9  # and it is nearly the best there is


def bound(electorate: Sequence[Voter], y: int, classes: int, mistake: str = "") -> int:
    """The bound in plain Python, or one with a mistake."""
    tops = [v.index(max(v)) for v in electorate if v is not None and v.count(max(v)) == 1]
    free = 0 if mistake == "undecided in round one" else len(electorate) - len(tops)
    others = [c for c in range(classes) if c != y]

    def pass_first(c: int, s: int) -> int:
        return max(tops.count(s) - tops.count(c) - free + (s < c or mistake == "ties in round one"), 0)

    def pass_second(c: int) -> int:
        firm = sum(v is not None and v[y] > v[c] for v in electorate)
        against = sum(v is None or v[y] <= v[c] for v in electorate)
        if mistake == "undecided in round two":
            against = sum(v is not None and v[y] < v[c] for v in electorate)
        return max(firm - against + (y < c or mistake == "ties in round two"), 0)

    def changes(gap: int, by: int) -> int:
        return -(-gap // (1 if mistake == "one vote a change" else by))

    pairs = [sorted(pass_first(c, y) for c in pair) for pair in itertools.combinations(others, 2)]
    ousting = [max(changes(b, 2), changes(a + b, 2 if mistake == "pairs by two" else 3)) for a, b in pairs]
    beating = [changes(max([pass_second(c), *(pass_first(c, s) for s in others if s != c)]), 2) for c in others]
    parts = [*([] if mistake == "no ousting" else ousting), *([] if mistake == "no beating" else beating), len(electorate) + 1]
    return min(parts) - 1 + (mistake == "one more")


MISTAKES = ["one more", "ties in round one", "ties in round two", "undecided in round one", "undecided in round two"]
MISTAKES += ["one vote a change", "no ousting", "no beating"]


@pytest.mark.parametrize("mistake", ["", *MISTAKES])
def test_every_mistake_in_the_bound_is_found(mistake: str) -> None:
    same, sound = True, True
    for classes, size, most in [(3, 2, 9999), (3, 4, 1000), (3, 5, 300), (4, 3, 400)]:
        electorates = sampled(classes, size, most)
        answer, radius = changes_survived(logits_of(electorates, classes), TOLERANCE)
        claims = torch.tensor([bound(e, y, classes, mistake) for e, y in zip(electorates, answer.tolist(), strict=True)])
        same &= torch.equal(claims, radius)
        sound &= bool((claims < fewest_changes(electorates, answer, classes)).all())
    assert same == (mistake == "")
    assert sound == (mistake == "")


@pytest.mark.parametrize("mistake", ["", "pairs by two", "one more"])
def test_larger_electorates_by_how_many_voters_are_alike(mistake: str) -> None:
    """Only the numbers of voters of each kind matter, and changing some into others costs what the numbers differ by."""
    size, ends = 8, decided(3)
    crowds = list(itertools.combinations_with_replacement(range(len(ends)), size))
    numbers = torch.tensor([[crowd.count(kind) for kind in range(len(ends))] for crowd in crowds])
    results = torch.tensor([transcribed([ends[kind] for kind in crowd], 3) for crowd in crowds])
    bases = (numbers[:, ends.index(None)] == 0).nonzero().squeeze(1)[::2].tolist()
    electorates = [[ends[kind] for kind in crowds[i]] for i in bases]
    answer, radius = changes_survived(logits_of(electorates, 3), TOLERANCE)
    claims = torch.tensor([bound(e, y, 3, mistake) for e, y in zip(electorates, answer.tolist(), strict=True)])
    cost = size - torch.minimum(numbers[bases][:, None], numbers).sum(2)
    limit = torch.where(results == answer[:, None], 99, cost).amin(1) - 1
    assert torch.equal(claims, radius) == (mistake == "")
    assert bool((claims <= limit).all()) == (mistake == "")
    assert float((radius == limit).float().mean()) > 0.9


@pytest.mark.parametrize(("classes", "size"), [(2, 5), (3, 4), (4, 2), (5, 1)])
def test_the_answer_is_the_run_off(classes: int, size: int) -> None:
    electorates = list(itertools.product(decided(classes), repeat=size))
    answers = run_off(logits_of(electorates, classes))
    assert answers.tolist() == [transcribed(e, classes) for e in electorates]


def test_a_run_off_can_overrule_the_plurality_and_certify_more() -> None:
    like_0, like_1, like_2 = [3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]
    logits = torch.tensor([[like_0] * 4 + [like_1] * 3 + [like_2] * 3])
    assert run_off(logits).tolist() == [1]
    # 30 voters for 0 and 20 for 1: a plurality would bear (30 - 20) / 2 changes. The 10 for 2 like 0 better than 1.
    many = torch.tensor([[[3.0, 1.0, 2.0]] * 30 + [[2.0, 3.0, 1.0]] * 20 + [[2.0, 1.0, 3.0]] * 10])
    answer, radius = changes_survived(many, TOLERANCE)
    assert answer.tolist() == [0]
    assert radius.tolist() == [10]  # 40 to 20 in the second round, where a tie still goes to 0


def test_logits_that_are_not_finite_vote_for_nobody() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[0.0, 2.0, 1.0], [nan, 2.0, 1.0], [0.0, inf, 1.0], [0.0, 2.0, -inf], [nan, nan, nan], [1.0, 1.0, 0.0]])
    assert cast_votes(logits).tolist() == [1, NO_VOTE, NO_VOTE, NO_VOTE, NO_VOTE, 0]
    assert firm_votes(logits, 0.0).tolist() == [1, NO_VOTE, NO_VOTE, NO_VOTE, NO_VOTE, NO_VOTE]
    assert run_off(logits[None, 1:5]).tolist() == [0]
    assert run_off(torch.tensor([[[1.0, 2.0, 0.0], [inf, 0.0, 0.0], [inf, 0.0, 0.0]]])).tolist() == [1]
    assert run_off(torch.tensor([[[2.0, 1.0, 0.0], [0.0, inf, 0.0], [0.0, inf, 0.0]]])).tolist() == [0]
    for tolerance in (0.0, TOLERANCE):
        assert [int(t) for t in changes_survived(logits[None, 1:5], tolerance)] == [0, -1]
        assert [int(t) for t in changes_survived(logits[None, :1].expand(1, 9, 3), tolerance)] == [1, 4]
        mixed = torch.cat([logits[:1].expand(8, 3), logits[2:3]])[None]
        assert [int(t) for t in changes_survived(mixed, tolerance)] == [1, 3]


def test_firm_votes_are_those_that_rounding_cannot_change() -> None:
    draws, tolerance = torch.Generator().manual_seed(0), 0.1
    logits = torch.randn(2000, 4, generator=draws) * torch.logspace(-3, 3, 2000)[:, None]
    votes, cast = firm_votes(logits, tolerance), cast_votes(logits)
    firm = votes != NO_VOTE
    assert 0.5 < firm.float().mean() < 0.99
    assert torch.equal(votes[firm], cast[firm])
    # The worst rounding within half of the tolerance: everything else up, the vote down.
    most = 0.4999 * tolerance * logits.abs().amax(1, keepdim=True)
    worst = (logits + most).scatter_add(1, cast[:, None], -2 * most)
    assert torch.equal(worst.argmax(1) == cast, firm)


def test_counts() -> None:
    counts = count_votes(torch.tensor([[2, 0, 2, NO_VOTE], [NO_VOTE] * 4, [1, 0, 0, 1]]), 3)
    assert counts.tolist() == [[1, 0, 2], [0, 0, 0], [2, 2, 0]]
