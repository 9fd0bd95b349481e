"""Running a training stage: what ``pretrain``, ``train`` and ``finetune`` have in common, and the demo too."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amsdn.commands.common import check_classes, describe_data, describe_model, provenance, read_json, write_about
from amsdn.data import Dataset, Split, batches
from amsdn.errors import InputError
from amsdn.evaluation.run_folder import data_fingerprint, model_fingerprint
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.models.storage import load_model, save_model
from amsdn.records import canonical, write_json
from amsdn.training.adversarial_train import AdversarialTrainConfig, AdversarialTraining
from amsdn.training.finetune_attacks import FinetuneConfig, Finetuning
from amsdn.training.loop import Stage, train
from amsdn.training.pretrain_ssrt import SSRT, PretrainConfig
from amsdn.utils.helpers import derive_seed

StageConfig = PretrainConfig | AdversarialTrainConfig | FinetuneConfig
FALSE_POSITIVE_RATE = 0.05


@dataclass(frozen=True)
class StageRun:
    """One stage, ready to go."""

    config: StageConfig
    model: AMSDNConfig
    folder: Path  # the stage's own folder; the model goes to folder/model
    start: Path | None  # a model folder to start from; None: fresh weights


def run_stage(run: StageRun, dataset: Dataset, device: torch.device) -> Path:
    """Train, calibrate the detector on held-out clean images, save; returns the folder of the finished model."""
    seed = run.config.loop.seed
    torch.manual_seed(derive_seed(seed, "weights"))
    model = _starting_model(run, dataset, device)
    stage = _make_stage(run.config, model)
    settings = {
        "config": run.config,
        "model": model.config,
        "data": [dataset.name, dataset.image_size, list(dataset.classes), data_fingerprint(dataset.train)],
        "start": model_fingerprint(model),
    }
    started = time.monotonic()
    averaged = train(stage, model, dataset.train, run.config.loop, run.folder, settings=settings)
    assert isinstance(averaged, AMSDN)
    if averaged.has_detector:
        calibrate(averaged, dataset.val, device)
    target = run.folder / "model"
    save_model(averaged, target)
    write_about(target, dataset)
    fingerprint, path = model_fingerprint(averaged), run.folder / "run.json"
    if path.exists() and read_json(path).get("model", {}).get("fingerprint") == fingerprint:
        return target  # the stage had already ended; what was recorded then stays
    info = provenance(
        device,
        stage=stage.name,
        seed=seed,
        config=canonical(run.config),
        model=describe_model(averaged, fingerprint),
        data={**describe_data(dataset, len(dataset.train)), "split": "train"},
        start=None if run.start is None else str(run.start),
        seconds=round(time.monotonic() - started, 1),
        # Pretraining sees no labels, so its classifier says nothing yet.
        clean_accuracy_val=None if isinstance(run.config, PretrainConfig) else clean_accuracy(averaged, dataset.val, device),
    )
    write_json(path, info)
    return target


def _starting_model(run: StageRun, dataset: Dataset, device: torch.device) -> AMSDN:
    config = dataclasses.replace(run.model, num_classes=len(dataset.classes))
    if run.start is None:
        return AMSDN.from_config(config).to(device)
    model = load_model(run.start, device)
    check_classes(model, dataset, str(run.start))
    wanted = {k: v for k, v in vars(config).items() if v is not None and k != "pretrained"}  # None: whatever suits the variant
    for name, value in wanted.items():
        if (found := getattr(model.config, name)) != value:
            raise InputError(
                f"{run.start}: made with {name} {found}, this stage wants {value}; pass --model.{name.replace('_', '-')} {found} or --init none"
            )
    return model


def _make_stage(config: StageConfig, model: AMSDN) -> Stage:
    if isinstance(config, PretrainConfig):
        return SSRT(config, model)
    if isinstance(config, FinetuneConfig):
        return Finetuning(config)
    return AdversarialTraining(config)


@torch.no_grad()
def calibrate(model: AMSDN, split: Split, device: torch.device) -> None:
    """Set the detection threshold on clean images that training never saw."""
    scores = [model.analyze(split.fetch(i)[0].to(device)).anomaly_score for i in batches(split, 256)]
    model.calibrate(torch.cat(scores), FALSE_POSITIVE_RATE)


@torch.no_grad()
def clean_accuracy(model: AMSDN, split: Split, device: torch.device) -> dict[str, Any]:
    """Share of held-out images classified correctly, with its count."""
    right = 0
    for i in batches(split, 256):
        x, y = split.fetch(i)
        right += int((model(x.to(device)).argmax(1).cpu() == y.cpu()).sum())
    return {"correct": right, "samples": len(split)}
