"""``amsdn compare``: two run folders, image by image, with paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from amsdn.commands.options import parse
from amsdn.errors import InputError
from amsdn.evaluation.comparison import compare_runs
from amsdn.evaluation.comparison_text import as_text
from amsdn.evaluation.statistics import CONFIDENCE
from amsdn.records import write_json


@dataclass(frozen=True)
class CompareOptions:
    """Options of ``amsdn compare``."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # two folders that amsdn evaluate wrote: A and B
    out: Path | None = None  # a file for everything as JSON
    confidence: float = CONFIDENCE  # of the intervals of the differences


def run(args: Sequence[str]) -> None:
    """Compare two runs."""
    description = "Which of two evaluated models is better at what, on the same images and the same attacks.\n\nExample: amsdn compare runs/demo/AMSDN runs/demo/control --out runs/comparison.json"
    options = parse(CompareOptions(), args, "compare", description)
    if len(options.runs) != 2:
        raise InputError(f"name two run folders, got {len(options.runs)}; for instance amsdn compare runs/demo/AMSDN runs/demo/control")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"--out {options.out}: is a folder; name a file, for instance {options.out / 'comparison.json'}")
    if not 0 < options.confidence < 1:
        raise InputError(f"--confidence must lie between 0 and 1, got {options.confidence:g}; 0.95 is customary")
    comparison = compare_runs(*options.runs, confidence=options.confidence)
    if options.out is not None:
        write_json(options.out, comparison.as_dict())
    print(as_text(comparison), end="")
    if options.out is not None:
        print(f"numbers: {options.out}")
