"""Run folders with outcomes small enough to count by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from amsdn.records import CertRecord, EvalRecord, config_hash

N = 20
DEFENDED_CLEAN_WRONG = {19}
# What breaks the defended model: attack -> (family, budget, samples). The plain model falls to everything but on sample 7.
ATTACKS: dict[str, tuple[str, float, set[int]]] = {
    "patch-small": ("patch", 2.0, {6}),
    "patch-a": ("patch", 5.0, {0, 1, 2, 3}),
    "patch-b": ("patch", 5.0, {2, 3, 4, 5, 6}),
    "pixels": ("sparse", 5.0, {0, 10}),
}


def write_run(folder: Path, *, defended: bool = True, detector: bool = True, strength: str = "", **info: Any) -> Path:
    """A complete run folder without certificates; ``strength`` changes the attacks' configuration hash."""
    rows = [_row(i, "clean", "clean", 0.0, not (defended and i in DEFENDED_CLEAN_WRONG), detector, strength) for i in range(N)]
    for name, (family, budget, broken) in ATTACKS.items():
        for i in range(N):
            right = (i not in broken | DEFENDED_CLEAN_WRONG) if defended else i == 7
            rows.append(_row(i, name, family, budget, right, detector, strength))
    folder.mkdir(parents=True)
    write_rows(folder / "eval.jsonl", rows)
    run = {
        "command": ["amsdn evaluate --seed 3"],
        "seed": 3,
        "data": {"name": "toy", "split": "test", "classes": [f"class-{k}" for k in range(3)]},
    }
    (folder / "run.json").write_text(json.dumps({**run, **info}))
    return folder


def add_settings(folder: Path, data: str = "toy images", model: str = "") -> Path:
    """The settings file that every evaluation leaves; without it two runs cannot be compared."""
    (folder / "eval_config.json").write_text(json.dumps({"data": data, "model": model or folder.name, "seed": 0}))
    return folder


def add_certificates(folder: Path, radius: float = 0.5) -> None:
    """Ten certificates: eight right at ``radius``, one wrong there, one abstention."""
    rows = [CertRecord(i, "c", 0, "l2", 0, 0, radius, True, 1100, 0.5) for i in range(8)]
    rows += [CertRecord(8, "c", 0, "l2", 0, 1, radius, False, 1100, 0.5), CertRecord(9, "c", 0, "l2", 0, -1, 0.0, False, 1100, 0.5)]
    write_rows(folder / "cert.jsonl", rows)


def add_examples(folder: Path, attack: str = "patch-b", maps: bool = True, **replaced: Any) -> None:
    """Six saved images of which the first was wrong before the attack; the last four pixels of each are changed."""
    clean = np.linspace(0, 1, 6 * 3 * 8 * 8, dtype=np.float32).reshape(6, 3, 8, 8)
    adversarial = clean.copy()
    adversarial[:, :, 3:5, 3:5] = 1 - adversarial[:, :, 3:5, 3:5]
    arrays: dict[str, Any] = {
        "ids": np.arange(6),
        "clean": clean,
        "adversarial": adversarial,
        "label": np.zeros(6, np.int64),
        "clean_prediction": np.array([1, 0, 0, 0, 0, 0]),
        "prediction": np.array([1, 0, 2, 2, 2, 2]),
        "clean_confidence": np.full(6, 0.75, np.float32),
        "adv_confidence": np.full(6, 0.5, np.float32),
    }
    if maps:
        arrays["anomaly_map_adv"] = np.full((6, 1, 8, 8), 0.25, np.float32)
    (folder / "examples").mkdir(exist_ok=True)
    np.savez(folder / "examples" / f"{attack}.npz", **{**arrays, **replaced})


def add_crosscheck(folder: Path, violations: int = 0) -> None:
    """A cross-check result as evaluation writes it."""
    found = {
        "certificate": "l2",
        "violations": violations,
        "samples": 9,
        "checks": 18,
        "abstained": 2,
        "false_alarm_bound": 0.01,
        "found": [],
        "rows": [{"sample_id": 0}],
    }
    (folder / "crosscheck.json").write_text(json.dumps({"violations": violations, "certificates": {"l2": found}}))


def add_evasion(folder: Path, family: str = "patch", budget: float = 5.0) -> None:
    """An attack that breaks samples 0 to 4 and is caught on none but sample 0."""
    rows = [_row(i, "evader", family, budget, i > 4, True, "") for i in range(N)]
    quiet = [dataclasses.replace(r, evades=True, detected=r.sample_id == 0, anomaly_score=0.9 * (r.sample_id == 0)) for r in rows]
    with (folder / "eval.jsonl").open("a") as f:
        f.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in quiet)


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))


def _row(i: int, name: str, family: str, budget: float, right: bool, detector: bool, strength: str) -> EvalRecord:
    attacked = family != "clean"
    score = (0.9 if attacked and not right else 0.01 * i) if detector else None
    return EvalRecord(
        sample_id=i,
        config_hash=config_hash(name, strength if attacked else ""),
        seed=0,
        attack=name,
        family=family,
        budget=budget,
        spent=budget,
        label=0,
        prediction=0 if right else 1,
        correct=right,
        margin=1.0 if right else -1.0,
        forwards=30,
        backwards=10,
        anomaly_score=score,
        detected=None if score is None else score > 0.5,
        localisation=0.8 if detector and attacked else None,
    )
