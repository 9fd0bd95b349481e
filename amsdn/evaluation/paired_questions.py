"""The questions that two runs can be asked together: image by image, about the same images and exactly the same attacks."""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from amsdn.evaluation.comparable import Evaluated
from amsdn.evaluation.headline import capital, describe, describe_certified, same_budget
from amsdn.evaluation.summary import headline_radii
from amsdn.evaluation.table import CLEAN, Table
from amsdn.records import EvalRecord


@dataclass(frozen=True)
class Question:
    """A row before it is counted: entry i of ``a`` and ``b`` is whether that model did well on image i."""

    key: str
    group: str
    label: str
    a: Sequence[bool]
    b: Sequence[bool]
    families: tuple[str | None, ...] = (None,)  # the threats whose attacks are behind the answers; None: no attack
    note: str = ""
    obstacle: str = ""  # why it is not comparable


class Pair:
    """The images and attacks that two runs share, and the questions about them."""

    def __init__(self, a: Evaluated, b: Evaluated) -> None:
        self.a, self.b = a, b
        self.ids = sorted(set(a.table.sample_ids) & set(b.table.sample_ids))
        self.whole = [restricted(run.table, self.ids) for run in (a, b)]  # all attacks of each
        self.names = [{rows[0].config_hash: name for name, rows in table.attacks.items()} for table in self.whole]
        both = self.names[0].keys() & self.names[1].keys()
        self.shared = [restricted(run.table, self.ids, both) for run in (a, b)]

    @cached_property
    def headline(self) -> dict[str, float]:
        """The headline threats; empty where the runs name different ones."""
        mine, other = self.a.headline, self.b.headline
        same = mine.keys() == other.keys() and all(same_budget(mine[f], other[f]) for f in mine)
        return {f: mine[f] for f in _ordered(mine)} if same else {}

    def questions(self) -> Iterator[Question]:
        """All rows, in the order of the table."""
        a, b = ([row.correct for row in table.clean] for table in self.whole)
        yield Question("clean", "clean", "Clean accuracy", a, b)
        mine, other = (table.budgets() for table in self.whole)
        for family in _ordered(mine.keys() & other.keys()):
            yield from (self._threat(family, v) for v in mine[family] if any(same_budget(v, w) for w in other[family]))
        if len(self.headline) > 1:
            yield _union([self._threat(family, budget) for family, budget in self.headline.items()])
        yield from self._attacks()
        yield from self._certified()
        if self.a.has_detector and self.b.has_detector:
            yield from self._alarms()

    def notes(self) -> Iterator[str]:
        """What a reader must know beside the rows."""
        if self.a.fingerprint == self.b.fingerprint:
            yield "Both runs are of the same model: differences are chance, or come from the attacks."
        if not self.headline and max(len(run.headline) for run in (self.a, self.b)):
            yield "The runs have different headline threats: there is no row for all of them together, and none about going unnoticed."
        seeds = [sorted({row.seed for row in table.clean}) for table in self.whole]
        if seeds[0] != seeds[1]:
            yield f"The attacks were started with different seeds: A {seeds[0][0]}, B {seeds[1][0]}."
        for side, other, run, rival in (("A", "B", self.a, self.b), ("B", "A", self.b, self.a)):
            if not rival.has_detector and any(rows[0].evades for rows in run.table.attacks.values()):
                yield f"Attacks on {side}'s detector are left out, for {other} has none to attack: they can only lower {side}'s numbers."
        for kind in sorted(self.a.certificates.keys() & self.b.certificates.keys()):
            if not self.a.certificates[kind].keys() & self.b.certificates[kind].keys():
                yield f"No image has a {kind} certificate in both runs."

    def _threat(self, family: str, budget: float) -> Question:
        """The worst case of each image over the attacks that count at this budget."""
        obstacle = self._other_attacks(family, budget)
        tables = self.whole if obstacle else self.shared
        a, b = ([not broken for broken in table.broken(family, budget)] for table in tables)
        note = self._attacks_behind(family, budget)
        return Question(f"threat:{family}:{budget:g}", "threat", capital(describe(family, budget)), a, b, (family,), note, obstacle)

    def _unshared(self, family: str, budget: float) -> list[tuple[str, list[str], int]]:
        """By side, the names of the attacks at this budget that only it met, and the number of those that the other could not meet.

        Attacks on a detector exist only for models that have one: where the other has none, they are left out on both sides.
        """
        mine, other = (_within(table, family, budget) for table in self.whole)
        found = []
        for side, here, there, rival in (("A", mine, other, self.b), ("B", other, mine, self.a)):
            extra = [row for key, row in here.items() if key not in there]
            possible = sorted(row.attack for row in extra if rival.has_detector or not row.evades)
            found.append((side, possible, len(extra) - len(possible)))
        return found

    def _other_attacks(self, family: str, budget: float) -> str:
        """Why the worst cases are not of the same attacks; empty where they are."""
        unshared = {side: set(names) for side, names, _ in self._unshared(family, budget)}
        changed = unshared["A"] & unshared["B"]
        told = [f"{', '.join(sorted(changed))} had other settings"] if changed else []
        told += [f"only {side} met {', '.join(sorted(names - changed))}" for side, names in unshared.items() if names - changed]
        return f"the attacks differ, {'; '.join(told)}" if told else ""

    def _attacks_behind(self, family: str, budget: float) -> str:
        """How many attacks the worst case is over, and how many were left out."""
        both = len(_within(self.shared[0], family, budget))
        left_out = [f"without the {out} on {side}'s detector" for side, _, out in self._unshared(family, budget) if out]
        return ", ".join([f"worst of {both} attack{'' if both == 1 else 's'} that both met", *left_out])

    def _attacks(self) -> Iterator[Question]:
        rows = [{found[0].config_hash: found for found in table.attacks.values()} for table in self.shared]
        place = {family: i for i, family in enumerate(_ordered(self.shared[0].budgets()))}
        firsts = {key: (place[found[0].family], found[0].budget, self._name(key)) for key, found in rows[0].items()}
        for key in sorted(firsts, key=firsts.__getitem__):
            family, budget = rows[0][key][0].family, rows[0][key][0].budget
            a, b = ([r.correct and c.correct for r, c in zip(rows[i][key], self.shared[i].clean, strict=True)] for i in (0, 1))
            yield Question(f"attack:{key}", "attack", self._name(key), a, b, (family,), describe(family, budget))

    def _name(self, key: str) -> str:
        return " / ".join(sorted({names[key] for names in self.names}))

    def _certified(self) -> Iterator[Question]:
        for kind in sorted(self.a.certificates.keys() & self.b.certificates.keys()):
            mine, other = self.a.certificates[kind], self.b.certificates[kind]
            ids = sorted(mine.keys() & other.keys())
            if not ids:
                continue
            differs = mine[ids[0]].config_hash != other[ids[0]].config_hash
            obstacle = f"the {kind} certificates were made with other settings" if differs else ""
            largest = max(runs[i].radius for runs in (mine, other) for i in ids)
            for place, radius in enumerate(headline_radii(kind, largest)):
                hits = [[runs[i].correct and runs[i].radius >= radius for i in ids] for runs in (mine, other)]
                if place and not any(map(any, hits)):
                    break  # beyond every certificate
                label = capital(describe_certified(kind, radius, largest))
                note = f"{kind} certificate"
                yield Question(f"certified:{kind}:{radius:g}", "certified", label, hits[0], hits[1], note=note, obstacle=obstacle)

    def _alarms(self) -> Iterator[Question]:
        """No alarm without an attack; and, of each headline threat, no image that is wrong without an alarm."""
        a, b = ([not row.detected for row in table.clean] for table in self.shared)
        yield Question("alarms", "alarms", "No false alarm", a, b, note="clean images, at each model's own threshold")
        for family, budget in self.headline.items():
            evading = sum(row.evades for row in _within(self.shared[0], family, budget).values())
            obstacle = self._other_attacks(family, budget) or ("" if evading else "no attack tried to stay unnoticed")
            hits = [table.unnoticed(family, budget) for table in (self.whole if obstacle else self.shared)]
            a, b = ([not unnoticed for unnoticed in found or ()] for found in hits)
            note = f"{self._attacks_behind(family, budget)}, {evading} of them on the detector"
            yield Question(
                f"unnoticed:{family}:{budget:g}", "unnoticed", capital(describe(family, budget)), a, b, (family,), note, obstacle
            )


def restricted(table: Table, ids: Sequence[int], hashes: Set[str] | None = None) -> Table:
    """The table of these images only, with the attacks of these configurations (None: all)."""
    place = {sample_id: i for i, sample_id in enumerate(table.sample_ids)}
    kept = [place[i] for i in ids]
    names = [name for name, rows in table.rows.items() if name == CLEAN or hashes is None or rows[0].config_hash in hashes]
    return Table(tuple(ids), {name: tuple(table.rows[name][i] for i in kept) for name in names}, table.dropped)


def _within(table: Table, family: str, budget: float) -> dict[str, EvalRecord]:
    """A row of each attack that counts at this budget (threat sets are nested), by configuration hash."""
    firsts = [rows[0] for rows in table.attacks.values()]
    return {r.config_hash: r for r in firsts if r.family == family and (r.budget <= budget or same_budget(r.budget, budget))}


def _union(threats: Sequence[Question]) -> Question:
    """Right under every headline threat."""
    a, b = ([all(right) for right in zip(*hits, strict=True)] for hits in ([t.a for t in threats], [t.b for t in threats]))
    obstacle = next((t.obstacle for t in threats if t.obstacle), "")
    families = tuple(family for t in threats for family in t.families)
    note = f"right under all of {', '.join(t.label for t in threats)}"
    return Question("union", "threat", "All headline threats", a, b, families, note, obstacle)


def _ordered(families: Iterable[str]) -> list[str]:
    """Families in the order of the table: what this package is about first."""
    first = ("patch", "sparse", "linf", "l2")
    return sorted(families, key=lambda f: (first.index(f) if f in first else len(first), f))
