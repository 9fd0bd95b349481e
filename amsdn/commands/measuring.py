"""Measuring one model into a run folder: what ``evaluate``, ``certify``, ``attack`` and the demo share."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amsdn.attacks import Attack
from amsdn.commands.common import describe_data, describe_model, provenance, read_json
from amsdn.data import Dataset
from amsdn.errors import InputError
from amsdn.evaluation.certification import ALL_SETTINGS
from amsdn.evaluation.evaluate import EvaluateConfig, evaluate
from amsdn.evaluation.run_folder import model_fingerprint
from amsdn.protocols import detector_of
from amsdn.records import EvalRecord, canonical, write_json


@dataclass(frozen=True)
class Measured:
    """What a measurement is about: a model, data and where the results go."""

    model: nn.Module
    name: str  # the --model argument, for provenance
    dataset: Dataset
    out: Path
    device: torch.device


def measure(
    run: Measured, attacks: Mapping[str, Attack], config: EvaluateConfig, samples: int | None, headline: Mapping[str, float] | None = None
) -> list[EvalRecord]:
    """Attack the first ``samples`` test images (None: all) and write the run folder with its provenance."""
    check_same_model(run)
    count = min(samples or len(run.dataset.test), len(run.dataset.test))
    started = time.monotonic()
    records = evaluate(run.model, run.dataset.test, attacks, run.out, config, sample_ids=range(count))
    update_run_json(
        run,
        "evaluate",
        headline=headline,
        seed=config.seed,
        samples=count,
        attacks={name: canonical(a) for name, a in attacks.items()},
        seconds=time.monotonic() - started,
    )
    return records


def check_same_model(run: Measured) -> None:
    """Raise InputError if the folder holds results of another model: attacks and certificates there are one model's."""
    fingerprint = model_fingerprint(run.model)
    for settings in (run.out / "eval_config.json", *sorted(run.out.glob(ALL_SETTINGS))):
        if settings.exists() and (found := read_json(settings).get("model")) != fingerprint:
            raise InputError(f"{run.out}: holds results of another model ({found}, this one is {fingerprint}); use another --out")


def training_history(model: Path) -> list[str]:
    """The commands that made a model folder, first stage first, as far as the run.json files beside the weights tell."""
    commands: list[str] = []
    folder: Path | None = model
    while folder is not None and (folder.parent / "run.json").exists():
        info = read_json(folder.parent / "run.json")
        if "stage" not in info:  # not a training stage's folder
            break
        commands.insert(0, f"{info.get('command')}  # {info['stage']}, seed {info.get('seed')}, commit {info.get('commit')}")
        folder = Path(info["start"]) if info.get("start") else None
    return commands


def update_run_json(
    run: Measured, stage: str, *, seconds: float, seed: int, samples: int, headline: Mapping[str, float] | None = None, **more: Any
) -> None:
    """Add what this stage did to OUT/run.json. The seconds of calls that ran to their end add up."""
    path = run.out / "run.json"
    info = read_json(path) if path.exists() else {}
    origin = provenance(run.device, seed=seed, samples=samples, **more)
    stages = {**info.get("stages", {}), stage: origin}
    times = info.get("seconds", {})
    info = {
        **{key: origin[key] for key in ("commit", "date", "versions", "hardware", "seed")},
        "command": [*training_history(Path(run.name)), *dict.fromkeys(s["command"] for s in stages.values())],
        "model": {"name": run.name, **describe_model(run.model, model_fingerprint(run.model))},
        "data": describe_data(run.dataset, max(s["samples"] for s in stages.values())),
        "seconds": {**times, stage: round(times.get(stage, 0.0) + seconds, 1)},
        "headline": info.get("headline") if headline is None else dict(headline),
        "stages": stages,
    }
    write_json(path, info)


def fitting(attacks: Mapping[str, Attack], model: nn.Module) -> dict[str, Attack]:
    """The attacks that this model can meet: one without a detector meets none that evades detectors."""
    return {name: a for name, a in attacks.items() if not a.evades or detector_of(model) is not None}


def choose(attacks: Mapping[str, Attack], names: tuple[str, ...]) -> dict[str, Attack]:
    """The attacks of these names, all where none is named; raises InputError for a name that is not there."""
    unknown = [n for n in names if n not in attacks]
    if unknown:
        raise InputError(f"--attacks {' '.join(unknown)}: not in this recipe's suite; it has {', '.join(attacks)}")
    return {n: attacks[n] for n in (names or attacks)}
