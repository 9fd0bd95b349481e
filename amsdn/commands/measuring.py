"""Measuring one model into a run folder: what ``evaluate``, ``certify``, ``attack`` and the demo share."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amsdn.attacks import Attack
from amsdn.attacks.base import check_gradients
from amsdn.attacks.black_box import QUERIES, searches
from amsdn.commands.common import describe_data, describe_model, provenance, read_json
from amsdn.data import Dataset
from amsdn.errors import InputError
from amsdn.evaluation.certification import ALL_SETTINGS
from amsdn.evaluation.evaluate import EvaluateConfig, evaluate
from amsdn.evaluation.hardest_pictures import keep_hardest
from amsdn.evaluation.protocol import Protocol
from amsdn.evaluation.run_folder import model_fingerprint
from amsdn.evaluation.shards import WHOLE, Shard
from amsdn.models.shipped import locate
from amsdn.protocols import detector_of, is_black_box
from amsdn.records import EvalRecord, canonical, write_json

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Measured:
    """What a measurement is about: a model, data and where the results go."""

    model: nn.Module
    name: str  # the --model argument, for provenance
    dataset: Dataset
    out: Path
    device: torch.device


def measure(
    run: Measured,
    attacks: Mapping[str, Attack],
    config: EvaluateConfig,
    samples: int | None,
    headline: Mapping[str, float] | None = None,
    *,
    shard: Shard = WHOLE,
    progress: bool = True,
    protocol: Protocol | None = None,
    planned: Mapping[str, float] | None = None,
) -> list[EvalRecord]:
    """Attack the first ``samples`` test images (None: all), or one shard of them, and write the run folder with its provenance.

    ``protocol``, where all of this comes from one, is written there too; ``planned`` is as ``evaluate`` takes it. The whole also leaves
    the hardest images as pictures (see ``hardest_pictures``). Raises InputError, before anything is written, for an attack that follows gradients on a
    model without any.
    """
    for name, attack in attacks.items():
        check_gradients(attack, run.model, f"attack {name}")
    check_same_model(run)
    count = min(samples or len(run.dataset.test), len(run.dataset.test))
    started = time.monotonic()
    ids = range(count)
    records = evaluate(
        run.model, run.dataset.test, attacks, run.out, config, sample_ids=ids, shard=shard, progress=progress, planned=planned
    )
    update_run_json(
        run,
        "evaluate",
        shard,
        headline=headline,
        seed=config.seed,
        samples=count,
        attacks={name: canonical(a) for name, a in attacks.items()},
        protocol=None if protocol is None else {"name": protocol.name, "version": protocol.version},
        seconds=time.monotonic() - started,
    )
    if shard.whole:
        keep_hardest(run.out, run.dataset.test, read_json(run.out / RUN_FILE)["headline"])
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
    folder: Path | None = locate(model)
    while folder is not None and (folder.parent / "run.json").exists():
        info = read_json(folder.parent / "run.json")
        if "stage" not in info:  # not a training stage's folder
            break
        commands.insert(0, f"{info.get('command')}  # {info['stage']}, seed {info.get('seed')}, commit {info.get('commit')}")
        folder = Path(info["start"]) if info.get("start") else None
    return commands


def update_run_json(
    run: Measured,
    stage: str,
    shard: Shard = WHOLE,
    *,
    seconds: float,
    seed: int,
    samples: int,
    headline: Mapping[str, float] | None = None,
    **more: Any,
) -> None:
    """Add what this stage did to OUT/run.json, or to a file of the shard's own.

    The seconds of calls that ran to their end add up, those of all shards included: what the work cost, not how long one had to wait.
    """
    path = run.out / shard.file(RUN_FILE)
    info = read_json(path) if path.exists() else {}
    shards = _shard_runs(run.out) if shard.whole else {}
    times = info.get("seconds", {})
    own = info.get("stages", {}).get(stage, {}).get("seconds", times.get(stage, 0.0)) + seconds
    origin = provenance(run.device, seed=seed, samples=samples, **more, seconds=round(own, 1))
    stages = {**info.get("stages", {}), stage: origin}
    info = {
        **{key: origin[key] for key in ("commit", "date", "versions", "hardware", "seed")},
        "command": [*training_history(Path(run.name)), *dict.fromkeys(s["command"] for s in stages.values())],
        "model": {"name": run.name, **describe_model(run.model, model_fingerprint(run.model))},
        "data": describe_data(run.dataset, max(s["samples"] for s in stages.values())),
        "seconds": {**times, stage: round(own + sum(part["seconds"].get(stage, 0.0) for part in shards.values()), 1)},
        "headline": info.get("headline") if headline is None else dict(headline),
        "stages": stages,
        "shards": shards,
    }
    write_json(path, info)


def _shard_runs(out: Path) -> dict[str, dict[str, Any]]:
    """Who did each shard, when, and in how many seconds a stage, by shard; nothing where there are none."""
    told = {path.name.split(".")[1].replace("-of-", "/"): read_json(path) for path in sorted(out.glob("run.*-of-*.json"))}
    kept = ("command", "commit", "date", "versions", "hardware", "seconds")
    return {shard: {key: info.get(key, {}) for key in kept} for shard, info in told.items()}


def fitting(attacks: Mapping[str, Attack], model: nn.Module, num_queries: int = QUERIES) -> dict[str, Attack]:
    """The attacks that this model can meet: one without a detector meets none that evades detectors, a black box none with gradients.

    For the threats of those left out a black box meets searches that only ask for answers, ``num_queries`` an image, so that none goes unmeasured.
    """
    met = {name: a for name, a in attacks.items() if not a.evades or detector_of(model) is not None}
    if not is_black_box(model):
        return met
    left_out = [a.threat for a in met.values() if a.needs_gradients]
    return {name: a for name, a in met.items() if not a.needs_gradients} | searches(left_out, num_queries)


def choose(attacks: Mapping[str, Attack], names: tuple[str, ...]) -> dict[str, Attack]:
    """The attacks of these names, all where none is named; raises InputError for a name that is not there."""
    unknown = [n for n in names if n not in attacks]
    if unknown:
        raise InputError(f"--attacks {' '.join(unknown)}: not in this recipe's suite; it has {', '.join(attacks)}")
    return {n: attacks[n] for n in (names or attacks)}
