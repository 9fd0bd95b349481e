"""What one check found, and what all of them say together."""

from collections.abc import Iterable
from dataclasses import dataclass


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
