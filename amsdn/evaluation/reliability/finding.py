"""What one check found, what all of them say together, and how that is kept beside a run's rows."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amsdn.errors import InputError

FILE = "reliability.json"
MODEL = "model"  # the findings that hold for every threat


@dataclass(frozen=True)
class Finding:
    """One check's outcome. ``measured`` beyond ``limit`` fails it; ``told`` says in one sentence what was seen and what it means."""

    check: str
    passed: bool
    measured: float
    limit: float
    told: str


def verdict(findings: Iterable[Finding]) -> str:
    """``yes``, or ``no, because ...`` with every check that failed."""
    failed = [finding.told for finding in findings if not finding.passed]
    return f"no, because {'; '.join(failed)}" if failed else "yes"


@dataclass(frozen=True)
class Reliability:
    """What the checks found, by threat; those of the model count for all of them."""

    findings: Mapping[str, list[Finding]] = field(default_factory=dict)

    def verdict(self, threat: str) -> str:
        """``yes``, or ``no, because ...``."""
        return verdict([*self.findings.get(MODEL, []), *self.findings.get(threat, [])])

    def as_dict(self) -> dict[str, Any]:
        """For reliability.json."""
        threats = {name: {"reliable": self.verdict(name), "findings": [asdict(f) for f in found]} for name, found in self.findings.items()}
        return {"threats": threats}


def read_checks(folder: Path) -> dict[str, dict[str, Any]] | None:
    """By threat, and for the model, ``{reliable, findings}`` of FOLDER/reliability.json; None where nothing was checked.

    Raises InputError for a file that is something else.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        threats: dict[str, dict[str, Any]] = json.loads(path.read_bytes())["threats"]
        for told in threats.values():
            _ = str(told["reliable"]), [Finding(**finding) for finding in told["findings"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: not the checks of an evaluation ({type(e).__name__}); delete it and run amsdn evaluate again") from e
    return threats
