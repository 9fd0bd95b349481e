"""Two evaluated runs compared image by image: which differences are shown, and which must not be claimed.

A row asks one question of every image (is it right, still right under the worst attack, certified) and pairs the answers of both models.
Every row is about the same images in both runs and, where attacks are behind it, about exactly the same attacks; where it is not, the row
says so and nothing is tested. The tests of all other rows count as one family (Holm).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from amsdn.errors import InputError
from amsdn.evaluation.comparable import Evaluated, check_comparable, read_evaluated
from amsdn.evaluation.headline import capital
from amsdn.evaluation.paired_questions import Pair, Question
from amsdn.evaluation.statistics import CONFIDENCE, holm, mcnemar, newcombe_paired

LEVEL = 0.05  # of all tests together
GROUPS = {
    "clean": "Right without an attack",
    "threat": "Right under every attack of a threat",
    "attack": "Right under one attack",
    "certified": "Right with a certificate",
    "alarms": "No alarm without an attack",
    "unnoticed": "Right or flagged, under every attack of a threat",
}
_PHRASES = {  # of one row, and of several
    "clean": ("clean accuracy", "clean accuracies"),
    "threat": ("the worst case", "worst cases"),
    "attack": ("the single attack, which is part of it", "single attacks, which are parts of these"),
    "certified": ("certified accuracy", "certified accuracies"),
    "alarms": ("false alarms", "false alarms"),
    "unnoticed": ("going unnoticed", "going unnoticed"),
}


@dataclass(frozen=True)
class ComparedRow:
    """One question to every image, and how often both models, one or neither of them answered well.

    ``difference``, ``low`` and ``high`` are A minus B in percentage points with its interval; these and the p-values are None where the
    row is not comparable, which ``verdict`` then says: else it is ``A``, ``B`` or ``no difference shown``.
    """

    key: str
    group: str  # one of GROUPS
    label: str
    note: str
    n: int
    accuracy_a: float  # in [0,1]
    accuracy_b: float
    both: int  # images that both models have right
    only_a: int
    only_b: int
    neither: int
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None  # McNemar, exact
    adjusted: float | None  # Holm, over all rows that are tested
    verdict: str

    @property
    def tested(self) -> bool:
        """Whether the row is comparable."""
        return self.p_value is not None


@dataclass(frozen=True)
class Side:
    """What only one of the two runs has, and what is known of its reliability."""

    folder: str
    model: str
    fingerprint: str
    besides: int  # images with all rows here that the other run has not
    incomplete: int  # images that lack rows of some attack here
    attacks: tuple[str, ...]  # that the other run lacks, or has with other settings
    certificates: tuple[str, ...]  # kinds that the other run lacks
    reliability: Mapping[str, str] | None
    unchecked: tuple[str, ...]  # threat families that no check has looked at


@dataclass(frozen=True)
class Comparison:
    """Run A beside run B; ``images`` is how many they share."""

    a: Side
    b: Side
    images: int
    confidence: float
    rows: tuple[ComparedRow, ...]
    notes: tuple[str, ...]
    level: float = LEVEL

    @property
    def sentence(self) -> str:
        """What the rows say together."""
        tested = sum(row.tested for row in self.rows)
        others = len(self.rows) - tested
        rest = f"; {others} row{'' if others == 1 else 's'} cannot be compared" if others else ""
        if not tested:
            return f"Nothing can be claimed: none of the {others} rows is comparable."
        told = [self._told(group) for group in GROUPS if any(row.group == group and row.tested for row in self.rows)]
        return f"{capital('; '.join(told))} ({100 * self.level:g} % over all {tested} tests together){rest}."

    def _told(self, group: str) -> str:
        """How the tested rows of one group came out; single attacks are part of the worst cases and so no further evidence."""
        found = [row.verdict for row in self.rows if row.group == group and row.tested]
        if len(found) == 1:
            return f"{_PHRASES[group][0]}: {found[0] if found[0] not in ('A', 'B') else f'{found[0]} better'}"
        return f"{_PHRASES[group][1]}: A better in {found.count('A')} of {len(found)}, B in {found.count('B')}"

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {**asdict(self), "sentence": self.sentence}


def compare_runs(a: Path, b: Path, confidence: float = CONFIDENCE) -> Comparison:
    """Compare two folders that ``amsdn evaluate`` wrote; raises InputError where they are broken, the same, or of other images."""
    if a.resolve() == b.resolve():
        raise InputError(f"{b}: is the same folder as {a}; name two runs")
    return compare(read_evaluated(a), read_evaluated(b), confidence)


def compare(a: Evaluated, b: Evaluated, confidence: float = CONFIDENCE) -> Comparison:
    """Every row that both runs can answer. Raises InputError where they share no images or are not of the same data."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence:g}; 0.95 is customary")
    check_comparable(a, b)
    pair = Pair(a, b)
    questions = [_checked(question, a, b) for question in pair.questions()]
    p_values = [mcnemar(q.a, q.b).p_value for q in questions if not q.obstacle]
    found = iter(zip(p_values, holm(p_values), strict=True))
    rows = tuple(_row(q, confidence, None if q.obstacle else next(found)) for q in questions)
    return Comparison(_side(a, b, pair), _side(b, a, pair), len(pair.ids), confidence, rows, tuple(pair.notes()))


def _checked(question: Question, a: Evaluated, b: Evaluated) -> Question:
    """The question with the obstacle that a run's own checks refute its number."""
    refuted = [side for side, run in (("A", a), ("B", b)) if any(run.unreliable(family) for family in question.families)]
    if question.obstacle or not refuted:
        return question
    told = "A's and B's numbers are" if len(refuted) == 2 else f"{refuted[0]}'s number is"
    return replace(question, obstacle=f"{told} unreliable")


def _row(question: Question, confidence: float, p_values: tuple[float, float] | None) -> ComparedRow:
    pairs = list(zip(question.a, question.b, strict=True))
    counts = (pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True)), pairs.count((False, False)))
    both, only_a, only_b, neither = counts
    n = len(pairs)
    row = ComparedRow(
        question.key,
        question.group,
        question.label,
        question.note,
        n,
        accuracy_a=(both + only_a) / n,
        accuracy_b=(both + only_b) / n,
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=neither,
        difference=None,
        low=None,
        high=None,
        p_value=None,
        adjusted=None,
        verdict=f"not comparable: {question.obstacle}",
    )
    if p_values is None:
        return row
    p_value, adjusted = p_values
    low, high = (100 * end for end in newcombe_paired(*counts, confidence))
    verdict = "no difference shown" if adjusted > LEVEL else "A" if only_a > only_b else "B"
    difference = 100 * (only_a - only_b) / n
    return replace(row, difference=difference, low=low, high=high, p_value=p_value, adjusted=adjusted, verdict=verdict)


def _side(run: Evaluated, other: Evaluated, pair: Pair) -> Side:
    mine, rival = pair.names if run is pair.a else pair.names[::-1]
    return Side(
        folder=run.folder,
        model=run.model,
        fingerprint=run.fingerprint,
        besides=len(run.table.sample_ids) - len(pair.ids),
        incomplete=run.table.dropped,
        attacks=tuple(sorted(name for key, name in mine.items() if key not in rival)),
        certificates=tuple(sorted(run.certificates.keys() - other.certificates.keys())),
        reliability=run.reliability,
        unchecked=tuple(run.unchecked(set(run.table.budgets()))),
    )
