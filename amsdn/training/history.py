"""The run's curve as rows of ``history.jsonl``, and what a person sees while it trains.

A row holds the step it was logged after, the images and training seconds until then, the learning rate and every metric. A run
that was killed drops the rows beyond the state it goes on from, so its file ends with the steps and numbers of an
undisturbed run; the seconds are those that led to the result, summed over all its legs.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from amsdn.errors import InputError
from amsdn.records import write_atomic

HISTORY_FILE = "history.jsonl"


class History:
    """Rows in FOLDER/history.jsonl: opened at a step, rows beyond it are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        """Raises InputError where a complete line is no row."""
        self.path = folder / HISTORY_FILE
        rows = read_history(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = self.path.open("a")

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; whoever reads the file sees it whole."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Before a state is saved: no state may outlive the rows that led to it, not even if the power fails."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """All complete rows, in order; a last line torn by a kill is left out. Raises InputError for a line that is no row."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot read the history of the run ({e}); delete it, training does not need it") from e
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError) as e:
            raise InputError(f"{path}:{number}: not a row of a training history; delete the file, training does not need it") from e
    return rows


class Journal:
    """Progress bar, TensorBoard and history of a run; with ``writes`` False (all processes but the first) nothing at all."""

    def __init__(self, name: str, folder: Path, step: int, total: int, *, writes: bool) -> None:
        self.name = name
        self.history = History(folder, step) if writes else None
        self.board = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10) if writes else None
        self.bar = tqdm(total=total, initial=step, desc=f"{name:>9}", unit="step", dynamic_ncols=True, mininterval=0.5, disable=not writes)

    def log(self, row: dict[str, float]) -> None:
        """Show and keep one row: ``step``, ``images``, ``seconds`` and the numbers of that moment."""
        shown = {k: f"{v:.3f}" for k, v in row.items() if k == "loss" or k.startswith("accuracy")}
        self.bar.set_postfix(shown, refresh=False)
        if self.history is not None:
            self.history.append(row)
        if self.board is not None:
            for key in row.keys() - {"step", "images", "seconds"}:
                self.board.add_scalar(f"{self.name}/{key}", row[key], int(row["step"]))

    def sync(self) -> None:
        """Called before a state is saved."""
        if self.history is not None:
            self.history.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        for open_file in (self.history, self.board):
            if open_file is not None:
                open_file.close()
