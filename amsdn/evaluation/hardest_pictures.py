"""The hardest images on the report: ``hardest.npz`` in a run folder, and the cards that show them.

The file holds ``ids`` and ``labels`` int64 [N] and ``images`` uint8 [N,3,h,w], the clean images, hardest first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from amsdn.errors import InputError
from amsdn.evaluation import figures
from amsdn.evaluation.examples import Arrays, pack
from amsdn.evaluation.hardest import Break, Hard, hardest
from amsdn.evaluation.headline import Run, describe
from amsdn.evaluation.pictures import class_name, read_arrays
from amsdn.evaluation.run_folder import Samples, writing_to
from amsdn.evaluation.summary import headline_budgets
from amsdn.evaluation.table import complete_table
from amsdn.records import EvalRecord, read_records, write_atomic

FILE = "hardest.npz"
LARGEST_SIDE = 64  # pixels a side; larger images are reduced


def keep_hardest(out: Path, split: Samples, headline: dict[str, float] | None) -> None:
    """Write the hardest images of the run folder ``out`` to its ``hardest.npz``; the same rows and images give the same bytes.

    All rows of the folder count, as they do on the page; ``headline`` is what run.json names. Where no image falls, or some attack
    was cut short before any image met all of them, there is no such file. Raises InputError where the folder cannot be written.
    """
    try:
        table = complete_table(read_records(out / "eval.jsonl", EvalRecord))
        hard = hardest(table, headline_budgets(table, headline))
    except InputError:  # the page says why; the evaluation itself has succeeded
        hard = []
    with writing_to(out):
        if hard:
            write_atomic(out / FILE, pack([_arrays(hard, split)]))
        else:
            (out / FILE).unlink(missing_ok=True)


def hardest_cards(run: Run, folder: Path) -> list[dict[str, Any]]:
    """The hardest images of a run, with their pictures where the run folder holds those of these very images.

    Raises InputError where its ``hardest.npz`` cannot be read or is something else.
    """
    pictures = _load(folder / FILE)
    hard = hardest(complete_table(run.records), run.summary["headline"])
    fits = pictures is not None and pictures["ids"].tolist() == [h.sample_id for h in hard]
    images = _thumbnails(pictures["images"]) if fits and pictures is not None else [None] * len(hard)
    classes = (run.info.get("data") or {}).get("classes") or []
    return [_card(h, image, classes) for h, image in zip(hard, images, strict=True)]


def _card(hard: Hard, image: str | None, classes: Sequence[Any]) -> dict[str, Any]:
    first = hard.breaks[0]
    return {
        "id": hard.sample_id,
        "label": class_name(classes, hard.label),
        "taken_for": class_name(classes, first.prediction),
        "fallen": hard.fallen,
        "attacks": hard.attacks,
        "first": _threat(first),
        "others": [_threat(b) for b in hard.breaks[1:]],
        "image": image,
    }


def _threat(found: Break) -> str:
    """A threat at the budget that was spent; norms with two digits, since they are not chosen but measured."""
    counted = found.spent == round(found.spent) or abs(255 * found.spent - round(255 * found.spent)) < 1e-4
    return describe(found.family, found.spent if counted else float(f"{found.spent:.2g}"))


def _arrays(hard: Sequence[Hard], split: Samples) -> Arrays:
    images = split.fetch(torch.tensor([h.sample_id for h in hard]))[0].detach().cpu().float()
    longest = max(images.shape[2:])
    if longest > LARGEST_SIDE:
        height, width = (max(1, round(side * LARGEST_SIDE / longest)) for side in images.shape[2:])
        images = F.interpolate(images, size=(height, width), mode="area")
    return {
        "ids": np.array([h.sample_id for h in hard], np.int64),
        "images": (images.clamp(0, 1) * 255).round().to(torch.uint8).numpy(),
        "labels": np.array([h.label for h in hard], np.int64),
    }


def _thumbnails(images: NDArray[np.uint8]) -> list[str]:
    return [figures.thumbnail(image.transpose(1, 2, 0).astype(np.float32) / 255) for image in images]


def _load(path: Path) -> Arrays | None:
    """The arrays of a ``hardest.npz``; None where there is no such file."""
    if not path.exists():
        return None
    arrays = read_arrays(path, "file of hardest images")
    problem = _problem_with(arrays)
    if problem:
        raise InputError(f"{path}: not a file of hardest images ({problem}); delete it and rerun `amsdn evaluate`")
    return arrays


def _problem_with(arrays: Arrays) -> str | None:
    missing = [key for key in ("ids", "images", "labels") if key not in arrays]
    if missing:
        return f"{missing[0]} is missing"
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or max(images.shape[2:]) > LARGEST_SIDE:
        return f"its images are {images.dtype} of shape {images.shape}"
    if any(arrays[key].shape != images.shape[:1] or arrays[key].dtype.kind != "i" for key in ("ids", "labels")):
        return "its ids and labels are not one whole number an image"
    return None
