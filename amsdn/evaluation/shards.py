"""Work divided among processes or machines: which part is whose, and the rows of all parts read as one.

The processes share one run folder and never wait for each other: each writes the rows of its own part into a file of its own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from amsdn.errors import InputError
from amsdn.records import Key, R, read_records

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1: every ``count``-th piece of the work from the ``index``-th on."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise InputError(_refusal(str(self)))

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """``2/4`` as the second of four; raises InputError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise InputError(_refusal(text))
        return cls(int(found[1]), int(found[2]))

    @property
    def whole(self) -> bool:
        """Whether this is all of the work."""
        return self.count == 1

    def of(self, pieces: Sequence[T]) -> Sequence[T]:
        """The pieces that are this shard's."""
        return pieces[self.index - 1 :: self.count]

    def file(self, name: str) -> str:
        """The name of this shard's own file: ``rows.jsonl`` is ``rows.2-of-4.jsonl`` for the second of four."""
        stem, dot, ending = name.rpartition(".")
        return name if self.whole else f"{stem}.{self.index}-of-{self.count}{dot}{ending}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard()


def every_shard(name: str) -> str:
    """The pattern that matches the file of this name of every shard, and of the whole."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}*{dot}{ending}"


def read_shards(out: Path, name: str, kind: type[R]) -> dict[Key, R]:
    """The rows of the file of this name and of those of every shard, by key; of a row that two of them hold, one.

    Raises InputError where a file is broken, or two rows of one key differ in more than ``seconds``.
    """
    rows: dict[Key, R] = {}
    for path in sorted(out.glob(every_shard(name))):
        for row in read_records(path, kind):
            first = rows.setdefault(row.key, row)
            if first is not row and _claims(first) != _claims(row):
                raise InputError(
                    f"{path}: contradicts another file of the folder on sample {row.sample_id}; delete {path.name} and run it again"
                )
    return rows


def _claims(row: object) -> str:
    """What a row says, without how long that took; as text, in which not-a-number equals itself."""
    return repr({**vars(row), "seconds": None})


def _refusal(text: str) -> str:
    return f"--shard {text}: must be i/n with i from 1 to n, for instance 1/4"
