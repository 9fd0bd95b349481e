"""Running a training stage: what ``pretrain``, ``train`` and ``finetune`` have in common, and the demo too."""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amsdn.commands.common import check_classes, describe_data, describe_model, provenance, read_json, write_about
from amsdn.commands.lock import only_writer
from amsdn.data import Dataset, Split, batches
from amsdn.errors import InputError
from amsdn.evaluation.run_folder import data_fingerprint, model_fingerprint
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.models.storage import load_model, save_model
from amsdn.records import canonical, write_json
from amsdn.training.adversarial_train import AdversarialTrainConfig, AdversarialTraining
from amsdn.training.budget import Plan, plan_stage, refuse_other_budget
from amsdn.training.finetune_attacks import FinetuneConfig, Finetuning
from amsdn.training.loop import LoopConfig, Stage, train
from amsdn.training.pretrain_ssrt import SSRT, PretrainConfig
from amsdn.training.ranks import ALONE, Ranks
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
    budget_s: float | None = None  # seconds that training may take; None: as many epochs as the configuration says


def run_stage(run: StageRun, dataset: Dataset, device: torch.device, ranks: Ranks = ALONE) -> Path:
    """Train, calibrate the detector on held-out clean images, save; returns the folder of the finished model.

    May be killed at any moment and called again: it goes on, and ends with the same weights and the same records.
    All of ``ranks`` train; the first alone writes, and the others wait for it.
    """
    with only_writer(run.folder) if ranks.first else contextlib.nullcontext():
        target = _run_stage(run, dataset, device, ranks)
    ranks.gather(None)
    return target


def _run_stage(run: StageRun, dataset: Dataset, device: torch.device, ranks: Ranks) -> Path:
    seed = run.config.loop.seed
    torch.manual_seed(derive_seed(seed, "weights"))
    model = _starting_model(run, dataset, device)
    start, data = model_fingerprint(model), data_fingerprint(dataset.train)
    settings = {
        "config": dataclasses.replace(run.config, loop=LoopConfig()),  # the loop compares its own
        "model": model.config,
        "data": [dataset.name, dataset.image_size, list(dataset.classes), data],
        "start": start,
    }
    plan = _plan(run, model, dataset, settings, ranks)
    config = run.config if plan is None else dataclasses.replace(run.config, loop=plan.fitted(run.config.loop, dataset.train))
    stage = make_stage(config, model, len(dataset.train))
    trained = train(stage, model, dataset.train, config.loop, run.folder, settings=settings, ranks=ranks)
    averaged, target = trained.model, run.folder / "model"
    assert isinstance(averaged, AMSDN)
    if not ranks.first:
        return target
    if averaged.has_detector:
        calibrate(averaged, dataset.val, device)
    save_model(averaged, target)
    write_about(target, dataset)
    fingerprint, path = model_fingerprint(averaged), run.folder / "run.json"
    if path.exists() and _recorded(path) == fingerprint:
        return target  # the stage had already ended; what was recorded then stays
    info = provenance(
        device,
        stage=stage.name,
        seed=seed,
        config=canonical(config),
        model=describe_model(averaged, fingerprint),
        data={**describe_data(dataset, len(dataset.train)), "split": "train"},
        start=None if run.start is None else str(run.start),
        seconds=round(trained.seconds, 1),  # of training, over all starts
        steps=trained.steps,
        images=trained.images,
        budget=None if plan is None else dataclasses.asdict(plan),
        # Pretraining sees no labels, so its classifier says nothing yet.
        clean_accuracy_val=None if isinstance(config, PretrainConfig) else clean_accuracy(averaged, dataset.val, device),
    )
    write_json(path, info)
    if plan is not None and (late := plan.lateness(trained.seconds)) is not None:
        print(f"{stage.name}: {late}", file=sys.stderr)
    return target


def _plan(run: StageRun, model: AMSDN, dataset: Dataset, settings: dict[str, Any], ranks: Ranks) -> Plan | None:
    """How many steps fit into the stage's time budget; None where it has none. Says what it found."""
    if run.budget_s is None:
        refuse_other_budget(run.folder)
        return None

    def sorts() -> list[Stage]:
        """One stage for each attack of the mixture."""
        configs = [dataclasses.replace(run.config, attacks=(attack,)) for attack in run.config.attacks] or [run.config]
        return [make_stage(config, model, len(dataset.train)) for config in configs]

    plan = plan_stage(sorts, model, dataset.train, run.config.loop, run.budget_s, run.folder, settings=settings, ranks=ranks)
    if ranks.first:
        print(f"{run.folder.name}: {plan.told()}", file=sys.stderr)
    return plan


def _recorded(path: Path) -> str | None:
    """The fingerprint of the model that a stage's run.json is about; None where the file is damaged, and is to be written again."""
    try:
        fingerprint: str | None = read_json(path)["model"]["fingerprint"]
    except (InputError, KeyError, TypeError):
        return None
    return fingerprint


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


def make_stage(config: StageConfig, model: AMSDN, images: int) -> Stage:
    """The stage that ``config`` configures, for so many training images."""
    if isinstance(config, PretrainConfig):
        return SSRT(config, model)
    if isinstance(config, FinetuneConfig):
        return Finetuning(config, images)
    return AdversarialTraining(config, images)


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
