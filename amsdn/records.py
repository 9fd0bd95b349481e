"""Evidence before averages: one JSON line per sample and attack (or certificate), written as it is known.

A record file is append-only. Rows are keyed, a batch of rows is written by one flushed and synced write,
and a line torn by a kill is dropped on the next opening. A run that is started again skips the keys it
finds and ends with the rows of an undisturbed run.
"""

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from amsdn.errors import InputError

Key = tuple[int, str, int]


@dataclass(frozen=True)
class EvalRecord:
    """What one attack did to one sample. The attack named ``clean`` changes nothing."""

    sample_id: int  # index in the evaluated split
    config_hash: str  # of the attack, see config_hash()
    seed: int
    attack: str  # a name for people, unique within a run
    family: str  # threat family, or "clean"
    budget: float  # the threat's budget, in the family's unit
    spent: float  # the budget the attacked image really uses
    label: int
    prediction: int
    correct: bool  # the prediction is the label, whatever the attacker wanted
    margin: float  # true-class logit minus best other logit on the attacked image
    forwards: int  # forward passes spent on this sample
    backwards: int
    anomaly_score: float | None  # None: the model has no detector
    detected: bool | None
    localisation: float | None  # anomaly map AUROC against the truly changed pixels, None where undefined
    evades: bool = False  # the attack also tried to stay below the detector's threshold
    success: bool | None = None  # the attack's own goal is reached; None: there is no attack, or the row is older than this field
    confidence: float | None = None  # the model's probability of its prediction; None: the row is older than this field
    pointing: float | None = None  # pointing game of the anomaly map: its largest value lies on a changed pixel; None where undefined
    overlap: float | None = None  # intersection over union of {map > 1/2} and the changed pixels; None where undefined

    @property
    def key(self) -> Key:
        return self.sample_id, self.config_hash, self.seed


@dataclass(frozen=True)
class CertRecord:
    """What one certificate says about one sample: inside ``radius`` the prediction cannot change."""

    sample_id: int
    config_hash: str
    seed: int
    certificate: str  # "l2", later "patch" and "l0"
    label: int
    prediction: int  # -1: abstained
    radius: float  # in the family's unit; 0 when abstained
    correct: bool
    samples: int  # forward passes spent
    seconds: float

    @property
    def key(self) -> Key:
        return self.sample_id, self.config_hash, self.seed


R = TypeVar("R", EvalRecord, CertRecord)


class RecordLog(Generic[R]):
    """The rows of one run in a JSONL file, as a mapping from key to row that can only grow."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        """Open or create ``path``; raises InputError where a complete line is no ``kind`` row."""
        self.path = path
        self.kind: type[R] = kind
        self.rows: dict[Key, R] = {row.key: row for row in read_records(path, kind)} if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()

    def append(self, rows: Iterable[R]) -> None:
        """Write all rows durably at once. A key that is already there is an error in the caller."""
        fresh = list(rows)
        assert not any(r.key in self.rows for r in fresh), f"row written twice: {[r.key for r in fresh if r.key in self.rows][:3]}"
        if not fresh:
            return
        with self.path.open("ab") as f:
            f.write("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in fresh).encode())
            f.flush()
            os.fsync(f.fileno())
        self.rows.update((r.key, r) for r in fresh)

    def missing(self, sample_ids: Iterable[int], config_hash: str, seed: int) -> list[int]:
        """The samples for which this configuration has no row yet."""
        return [i for i in sample_ids if (i, config_hash, seed) not in self.rows]

    def __iter__(self) -> Iterator[R]:
        return iter(self.rows.values())

    def __len__(self) -> int:
        return len(self.rows)

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with self.path.open("r+b") as f:
                f.truncate(data.rfind(b"\n") + 1)


def read_records(path: Path, kind: type[R]) -> list[R]:
    """All complete rows of a record file; an unfinished last line is ignored, a broken one is an InputError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot read records ({e.strerror}); check the path") from e
    complete = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            rows.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as e:
            raise InputError(f"{path}:{number}: not a {kind.__name__} row ({e}); delete the file to start afresh") from e
    return rows


def canonical(value: Any) -> Any:
    """A configuration as plain JSON values with class names kept, so that equal text means equal configuration."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no configuration value")


def config_hash(*values: Any) -> str:
    """Twelve hex digits that change whenever any configured value does."""
    text = json.dumps([canonical(v) for v in values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary neighbour, synced, then renamed over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")  # containers share process numbers
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
