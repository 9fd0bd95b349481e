"""``amsdn report``: one page from one or more run folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from amsdn.commands.options import parse
from amsdn.errors import InputError
from amsdn.evaluation.report import build_report, terminal_table


@dataclass(frozen=True)
class ReportOptions:
    """Options of ``amsdn report``."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders, each as DIR or NAME=DIR; the first is the page's subject
    out: Path | None = None  # folder for report.html and report.json; default: the first run folder
    title: str = "AMSDN robustness report"


def run(args: Sequence[str]) -> None:
    """Build the page."""
    description = "One self-contained page from evaluated runs.\n\nExample: amsdn report defended=checkpoints/digits-demo/evaluation control=runs/control"
    options = parse(ReportOptions(), args, "report", description)
    if not options.runs:
        raise InputError("no run folder given; name at least one, for instance amsdn report checkpoints/digits-demo/evaluation")
    runs = dict(_named(text) for text in options.runs)
    if len(runs) < len(options.runs):
        raise InputError(f"two runs have the same name ({', '.join(options.runs)}); name them apart as NAME=DIR")
    page = build_report(runs, options.out or next(iter(runs.values())), title=options.title)
    print(terminal_table(runs))
    print(f"report: {page}")


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if equals and name and not Path(text).exists():
        return name, Path(folder)
    path = Path(text)
    return path.name or str(path), path
