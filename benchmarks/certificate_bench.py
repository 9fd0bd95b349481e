"""What the parts of ``benchmarks/certification.py`` share: the model, the images, the folder to go on in, and means with intervals."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from amsdn.evaluation.certification import certify_split
from amsdn.evaluation.certifier import Certifier
from amsdn.evaluation.run_folder import Samples
from amsdn.records import CertRecord, write_json


@dataclass(frozen=True)
class Bench:
    """One model on the first ``images`` test images, measured into ``work``."""

    model: nn.Module
    split: Samples
    classes: int
    device: torch.device
    work: Path
    images: int
    minutes: float  # for each line of a table that may have to do with fewer images
    sigma: float
    batch_size: int  # noisy copies, or masked or partial views, in memory at once
    progress: bool = True

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` images [B,3,H,W] and their labels [B] on the model's device."""
        x, y = self.split.fetch(torch.arange(min(count, self.images)))
        return x.to(self.device), y.to(self.device)

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` returned the first time that ``key`` was asked for in this work folder, as JSON values."""
        path = self.work / "measured" / f"{key}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure())
        return json.loads(path.read_text())


def certified(bench: Bench, folder: str, certifier: Certifier, chunk: int | None = None, most: int | None = None) -> list[CertRecord]:
    """The certificates of the first images, in a run folder of ``bench.work``; see ``certify_split``.

    With ``chunk``, as many images as fit in ``bench.minutes`` of the records' own seconds, and at least one chunk. Killed, it goes on.
    """
    total, done = min(bench.images, most or bench.images), 0
    rows: list[CertRecord] = []
    while done < total:
        done = total if chunk is None else min(done + chunk, total)
        rows = certify_split(certifier, bench.split, bench.work / folder, sample_ids=range(done), progress=bench.progress)
        if sum(r.seconds for r in rows if r.certificate == certifier.kinds[0]) >= 60 * bench.minutes and chunk is not None:
            break
    return rows


def mean_of(values: Sequence[float]) -> dict[str, Any] | None:
    """The mean with its 95 % interval by the normal law, None without values; of one value there is no interval."""
    if not values:
        return None
    half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    mean = fmean(values)
    return {"n": len(values), "mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}
