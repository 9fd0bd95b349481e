"""Two evaluated runs on their way to a comparison: read, and refused unless they are of the same images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amsdn.errors import InputError
from amsdn.evaluation.certification import read_certificates
from amsdn.evaluation.evaluate import RECORDS, SETTINGS
from amsdn.evaluation.reliability import MODEL, read_checks
from amsdn.evaluation.shards import read_shards
from amsdn.evaluation.summary import headline_budgets
from amsdn.evaluation.table import Table, complete_table
from amsdn.records import CertRecord, EvalRecord


@dataclass(frozen=True)
class Evaluated:
    """One run: its rows on the images that have all of them, its certificates, and what is told of its reliability."""

    folder: str
    model: str  # its name in run.json
    fingerprint: str  # of the model
    data: tuple[str, str, str]  # name, split and fingerprint
    table: Table
    labels: Mapping[int, int]  # of every image that any row is of
    certificates: Mapping[str, Mapping[int, CertRecord]]  # by kind and image
    headline: Mapping[str, float]  # budget by family
    reliability: Mapping[str, str] | None  # by threat family "yes" or "no, because ..."; None: never checked

    @property
    def has_detector(self) -> bool:
        """Whether every row tells if the model raised an alarm."""
        return all(row.detected is not None for rows in self.table.rows.values() for row in rows)

    def unreliable(self, family: str | None) -> bool:
        """Whether the checks refute numbers of this family; None: those that no attack is behind."""
        told = self.reliability or {}
        return any(told.get(name, "yes") != "yes" for name in (MODEL, family) if name is not None)

    def unchecked(self, families: set[str]) -> list[str]:
        """The families that no check has looked at, in order."""
        return sorted(families - set(self.reliability or {}))


def read_evaluated(folder: Path) -> Evaluated:
    """A run folder as ``amsdn evaluate`` writes it; raises InputError where something of it is missing, broken or mixed."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder; make it with `amsdn evaluate`")
    info, settings = _read_object(folder / "run.json"), _read_object(folder / SETTINGS)
    data, model, headline = (_part(info, key, folder / "run.json") for key in ("data", "model", "headline"))
    if not all(isinstance(budget, int | float) for budget in headline.values()):
        raise InputError(f"{folder / 'run.json'}: a headline budget is no number; delete the folder and evaluate again")
    if not isinstance(settings.get("data"), str):
        raise InputError(f"{folder / SETTINGS}: lacks the fingerprint of the data; delete the folder and evaluate again")
    rows = list(read_shards(folder, RECORDS, EvalRecord).values())
    if not rows:
        raise InputError(f"{folder / RECORDS}: missing or empty; run `amsdn evaluate` first")
    try:
        table = complete_table(rows)
        certificates = _by_image(read_certificates(folder))
        labels = _labels([*rows, *(row for kind in certificates.values() for row in kind.values())])
        budgets = headline_budgets(table, headline)
    except InputError as e:
        raise InputError(f"{folder}: {str(e).removeprefix(f'{folder}: ')}") from e
    checks = read_checks(folder)
    return Evaluated(
        folder=str(folder),
        model=str(model.get("name", "unnamed model")),
        fingerprint=str(settings.get("model")),
        data=(str(data.get("name")), str(data.get("split")), settings["data"]),
        table=table,
        labels=labels,
        certificates=certificates,
        headline=budgets,
        reliability=None if checks is None else {name: str(told["reliable"]) for name, told in checks.items()},
    )


def check_comparable(a: Evaluated, b: Evaluated) -> None:
    """Raise InputError unless both runs are of the same data, have images in common and agree about their labels."""
    for what, mine, other in zip(("data", "split", "images (by their fingerprint)"), a.data, b.data, strict=True):
        if mine != other:
            raise InputError(f"{b.folder}: of other {what} than {a.folder} ({other}, there {mine}); compare runs on the same data")
    differing = [i for i, label in a.labels.items() if b.labels.get(i, label) != label]
    if differing:
        raise InputError(
            f"{b.folder}: disagrees with {a.folder} about the labels of {len(differing)} images, the first of them {min(differing)}; "
            "compare runs on the same data"
        )
    if not set(a.table.sample_ids) & set(b.table.sample_ids):
        raise InputError(f"{b.folder}: no image has all rows both there and in {a.folder}; evaluate both on the same images")


def _by_image(rows: list[CertRecord]) -> dict[str, dict[int, CertRecord]]:
    found: dict[str, dict[int, CertRecord]] = {}
    for row in rows:
        kind = found.setdefault(row.certificate, {})
        first = next(iter(kind.values()), row)
        if row.sample_id in kind or (row.config_hash, row.seed) != (first.config_hash, first.seed):
            raise InputError(f"the {row.certificate!r} certificates are of several configurations; compare one at a time")
        kind[row.sample_id] = row
    return found


def _labels(rows: list[EvalRecord | CertRecord]) -> dict[int, int]:
    labels: dict[int, int] = {}
    for row in rows:
        if labels.setdefault(row.sample_id, row.label) != row.label:
            raise InputError(f"rows disagree about the label of image {row.sample_id}; delete the folder and evaluate again")
    return labels


def _part(value: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    """The object under ``key``, an empty one where it is missing or null."""
    found = value.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: {key!r} is no JSON object; delete the folder and evaluate again")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); compare folders that `amsdn evaluate` wrote") from e
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}); delete it and run `amsdn evaluate` again") from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; delete it and run `amsdn evaluate` again")
    return value
