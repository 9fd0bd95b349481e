"""The images that fall most easily: to the most attacks, and at the smallest budgets. A pure function of the table of rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from amsdn.evaluation.table import Table
from amsdn.records import EvalRecord

HARDEST = 12  # images that are shown


@dataclass(frozen=True)
class Break:
    """The cheapest way in which attacks of one family turned an image wrong."""

    family: str
    spent: float  # the smallest budget that sufficed, in the family's unit
    share: float  # of the family's headline budget
    attack: str
    prediction: int  # what the image is then taken for


@dataclass(frozen=True)
class Hard:
    """An image that is right without an attack and wrong under some of them."""

    sample_id: int
    label: int
    fallen: int  # attacks that turn it wrong
    attacks: int  # attacks that it met
    breaks: tuple[Break, ...]  # one a family that breaks it, in order of share; the first is what breaks it first
    margin: float  # without an attack: true-class logit minus best other logit

    @property
    def order(self) -> tuple[float, ...]:
        """Hardest first: most attacks, then the smallest share of a headline budget, then the smallest margin, then the id."""
        return (-self.fallen, self.breaks[0].share, self.margin, self.sample_id)


def hardest(table: Table, headline: Mapping[str, float], number: int = HARDEST) -> list[Hard]:
    """The first ``number`` images by ``Hard.order``; fewer where fewer fall.

    What an attacked image spends counts where it is less than the attack's budget, as everywhere. Budgets are told as shares of ``headline``'s
    (the family's largest evaluated one where it is not named there), so that families can be compared.
    """
    scale = {family: headline.get(family, budgets[-1]) for family, budgets in table.budgets().items()}
    found = []
    for i, clean in enumerate(table.clean):
        broken = [rows[i] for rows in table.attacks.values() if not rows[i].correct]
        if clean.correct and broken:
            found.append(Hard(clean.sample_id, clean.label, len(broken), len(table.attacks), _breaks(broken, scale), clean.margin))
    return sorted(found, key=lambda hard: hard.order)[:number]


def _breaks(broken: list[EvalRecord], scale: Mapping[str, float]) -> tuple[Break, ...]:
    """The cheapest break of each family; among equals, the attack that was evaluated first."""
    cheapest: dict[str, Break] = {}
    for row in broken:
        spent = min(row.budget, row.spent)
        share = spent / scale[row.family] if scale[row.family] else inf
        if row.family not in cheapest or spent < cheapest[row.family].spent:
            cheapest[row.family] = Break(row.family, spent, share, row.attack, row.prediction)
    return tuple(sorted(cheapest.values(), key=lambda b: (b.share, b.family)))
