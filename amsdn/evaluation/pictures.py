"""The report's pictures: a few images before and after an attack, what changed, and where the model suspects it."""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amsdn.errors import InputError
from amsdn.evaluation import figures
from amsdn.evaluation.headline import Run, capital, describe, strongest_attack

PICTURES = 4  # images shown for each threat
ARRAYS = ("ids", "clean", "adversarial", "label", "clean_prediction", "prediction", "clean_confidence", "adv_confidence")
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    KeyError,
    RuntimeError,
)  # what NumPy raises for a file that is no npz


def picture_groups(run: Run, folder: Path) -> list[dict[str, Any]]:
    """For each threat, a few images before and after its strongest attack; threats without saved examples are left out."""
    groups = []
    for family, budget in run.summary["headline"].items():
        name = strongest_attack(run, family, budget)
        path = folder / "examples" / f"{name}.npz"
        if name is not None and path.exists():
            groups.append({"threat": capital(describe(family, budget)), "attack": name, "examples": _examples(run, name, path)})
    return groups


def _examples(run: Run, attack: str, path: Path) -> list[dict[str, Any]]:
    """The first saved images that were right before the attack (all of them if none was); outcomes are not selected."""
    arrays = _load_arrays(path)
    right = np.flatnonzero(arrays["clean_prediction"] == arrays["label"])
    chosen = (right if len(right) else np.arange(len(arrays["ids"])))[:PICTURES]
    flagged = {r.sample_id: r.detected for r in run.records if r.attack == attack}
    classes = (run.info.get("data") or {}).get("classes") or []
    return [_example(arrays, int(i), classes, flagged.get(int(arrays["ids"][i]))) for i in chosen]


def _example(arrays: Mapping[str, NDArray[Any]], i: int, classes: Sequence[Any], detected: bool | None) -> dict[str, Any]:
    clean, attacked = (arrays[k][i].transpose(1, 2, 0).astype(np.float32) for k in ("clean", "adversarial"))
    change, change_caption = figures.difference(clean, attacked)
    heat = arrays["anomaly_map_adv"][i].reshape(arrays["anomaly_map_adv"].shape[-2:]) if "anomaly_map_adv" in arrays else None
    return {
        "id": int(arrays["ids"][i]),
        "label": class_name(classes, arrays["label"][i]),
        "before": class_name(classes, arrays["clean_prediction"][i]),
        "after": class_name(classes, arrays["prediction"][i]),
        "before_confidence": float(arrays["clean_confidence"][i]),
        "after_confidence": float(arrays["adv_confidence"][i]),
        "fooled": bool(arrays["prediction"][i] != arrays["label"][i]),
        "detected": detected,
        "clean": figures.thumbnail(clean),
        "attacked": figures.thumbnail(attacked),
        "change": figures.thumbnail(change),
        "change_caption": change_caption,
        "heat": None if heat is None else figures.thumbnail(figures.heat_overlay(attacked, heat)),
        "peak": None if heat is None else float(heat.max()),
    }


def read_arrays(path: Path, what: str) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, by name; raises InputError, which calls it ``what``, for anything else. Nothing is unpickled."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (*UNREADABLE, zipfile.BadZipFile, zlib.error) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: not a readable {what} ({reason}); delete it and rerun `amsdn evaluate`") from e


def class_name(classes: Sequence[Any], index: Any) -> str:
    """The name of a class; its number where it has none."""
    return str(classes[int(index)]) if 0 <= int(index) < len(classes) else str(int(index))


def _load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    arrays = read_arrays(path, "examples file")
    problem = _problem_with(arrays)
    if problem:
        raise InputError(f"{path}: not an examples file ({problem}); delete it and rerun `amsdn evaluate`")
    return arrays


def _problem_with(arrays: Mapping[str, NDArray[Any]]) -> str | None:
    missing = [key for key in ARRAYS if key not in arrays]
    if missing:
        return f"{missing[0]} is missing"
    if any(array.ndim < 1 or len(array) != len(arrays["ids"]) for array in arrays.values()):
        return "its arrays differ in length"
    shape = arrays["clean"].shape
    if len(shape) != 4 or shape[1] != 3 or shape != arrays["adversarial"].shape:
        return f"its images have shapes {shape} and {arrays['adversarial'].shape}"
    heat = arrays.get("anomaly_map_adv")
    if heat is not None and (heat.ndim not in (3, 4) or heat[0].size != heat.shape[-1] * heat.shape[-2]):
        return f"its anomaly maps have shape {heat.shape}"
    return None
