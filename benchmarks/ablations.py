"""Does each part of the design earn its cost? Every part switched off or on in turn, at equal training cost, against plain backbones.

Arms differ in the model (attention, purification, FPN), in SSRT pretraining, in labels, or in width. The cost of an arm's training step is
measured side by side with the others', in process time, and every arm gets as many steps as the budget pays for: whoever drops a
part trains longer. ``plain`` is the backbone without any part, ``plain, wider`` the same at the width whose step costs what all
parts together cost. SSRT is also tried where it should help most: many images, labels for few of them. Consistency is a matter of
inference, and measured on the trained models by ``ablation_consistency.py``; run this again afterwards to gather both.

All are judged on the first images of the *validation* split, so that nothing is chosen on the test images of the tables, by attacks
that go through the whole defence. Every run resumes; a killed benchmark goes on where it was, and several may share a ``--work``
folder if their arms or seeds differ.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from amsdn.attacks import Attack, Cascade, EvadeDetector, GuidedSparseRS, PatchPGD, SparsePGD
from amsdn.commands.common import provenance, read_json
from amsdn.commands.stages import StageRun, clean_accuracy, run_stage
from amsdn.data import Augment, Dataset, load_dataset
from amsdn.data.sampling import balanced_first
from amsdn.evaluation.certification import certify_split
from amsdn.evaluation.evaluate import EvaluateConfig, evaluate
from amsdn.evaluation.patch_certificate import PatchCertifier
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.models.storage import load_model
from amsdn.recipes.defences import PatchDefence
from amsdn.records import write_json
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.defence import DefenceLoss
from amsdn.training.loop import LoopConfig
from amsdn.training.pretrain_ssrt import PretrainConfig
from amsdn.training.views import CertifiableViews, GreedyCutout
from amsdn.utils.helpers import keep_freed_memory

AUGMENT = Augment(flip=True, shift=4)
PATCH, PIXELS, BATCH = 5, 10, 128
SSRT_SHARE = 0.08  # of the training cost, where labels are many
COST_STEPS, REPEATS = (5, 20), 2  # the runs whose difference is the cost of a step, and how often each is measured
BASE = AMSDNConfig(variant="compact", width=16, bounded_evidence=True)
PLAIN: dict[str, Any] = {"fpn": False, "attention": False, "purification": False, "bounded_evidence": False}


@dataclass(frozen=True)
class Arm:
    """What differs from all parts: fields of the model's configuration, how much SSRT comes first, how many images have labels."""

    about: str
    model: Mapping[str, Any] = field(default_factory=dict)
    ssrt: float = 0.0  # of the training cost
    labels: int | None = None  # images that have one; None: all
    evading: bool = True  # whether training meets attacks that avoid the detector, where there is one
    pull: bool = True  # whether the evidence of attacked images is pulled to the averaged teacher's on the clean ones


ARMS: dict[str, Arm] = {
    "all parts": Arm("attention with bounded evidence, purification, FPN"),
    "plain": Arm("the backbone alone, trained longer", PLAIN),
    "purification alone": Arm("the backbone with purification and its detector", PLAIN | {"purification": True}),
    "no purification": Arm("all but purification, so no detector", {"purification": False}),
    "no attention": Arm("all but attention and its bounded evidence", {"attention": False, "bounded_evidence": False}),
    "no FPN": Arm("all but the top-down pathway", {"fpn": False}),
    "SSRT first": Arm("all parts after a little SSRT", ssrt=SSRT_SHARE),
    "plain, wider": Arm("the backbone alone, as wide as the cost of all parts pays for", PLAIN | {"width": 20}),
    "few labels": Arm("all parts, 2,000 labels", labels=2000),
    "few labels, SSRT first": Arm("all parts, 2,000 labels, half of the cost spent on SSRT without labels", ssrt=0.5, labels=2000),
    "unbounded": Arm("all parts, attention as of old: locations as loud as they like", {"bounded_evidence": False}),
    "no pull": Arm("all parts, nothing pulled to the averaged teacher's evidence", pull=False),
    "not evading": Arm("all parts, no training against attacks that avoid the detector", evading=False),
}


def pretrain_config(epochs: float, seed: int) -> PretrainConfig:
    """SSRT as in the CPU recipe."""
    return PretrainConfig(loop=LoopConfig(epochs=epochs, batch_size=BATCH, seed=seed), augment=AUGMENT)


def train_config(arm: Arm, epochs: float, seed: int) -> AdversarialTrainConfig:
    """Patches and pixels with the few steps a CPU affords, half of them avoiding the detector, and masks for consistency and the certificate."""
    attacks: tuple[Attack, ...] = (
        PatchPGD(PATCH, num_steps=2, alpha=0.5, move="never", stop_when_fooled=False),
        PatchPGD(8, num_steps=2, alpha=0.5, move="never", stop_when_fooled=False),
        SparsePGD(6 * PIXELS, num_steps=2, alpha=0.5, stop_when_fooled=False),
    )
    if meets_evading(arm):
        attacks += (EvadeDetector(attacks[0]), EvadeDetector(attacks[2]))
    return AdversarialTrainConfig(
        loop=LoopConfig(epochs=epochs, batch_size=BATCH, learning_rate=3e-3, weight_decay=0.02, seed=seed),
        loss=DefenceLoss() if arm.pull else DefenceLoss(feature_pull=0),
        augment=AUGMENT,
        attacks=attacks,
        attacked_share=0.4,
        clean_start=0.2,
        views=CertifiableViews(masked=0.3, cutouts=(GreedyCutout(PATCH, 3, candidates=1),)),
    )


def judges(queries_scale: float) -> dict[str, Attack]:
    """The attacks that judge every arm; the last only where there is a detector to evade."""

    def n(count: int) -> int:
        return max(round(count * queries_scale), 1)

    return {
        "patch": PatchPGD.racing(PATCH, n(60)),
        "pixels": Cascade((SparsePGD(PIXELS, n(40)), GuidedSparseRS(PIXELS, n(300)))),
        "patch-evading": EvadeDetector(PatchPGD.racing(PATCH, n(60))),
    }


def measured_costs(data: Dataset, arms: Mapping[str, Arm], work: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of process time of one training and one pretraining step of every arm; kept in WORK/costs.json.

    Rounds are interleaved and differ in the attacks that are drawn, alike for all arms. Whatever else runs on the machine only adds to a
    measurement, so each is repeated and the least counts; then comes the mean over rounds. The first round warms up.
    """
    kept = work / "costs.json"
    if kept.exists() and (found := read_json(kept)).keys() >= arms.keys():
        return found
    taken: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for job in dict.fromkeys(job for arm in arms.values() for job in jobs(arm)):
            seconds = min(_seconds_of_a_step(data, job, turn, work / "cost-runs") for _ in range(REPEATS))
            taken.setdefault(repr(job), []).append(seconds)
    costs = {name: {job.stage: fmean(taken[repr(job)][1:]) for job in jobs(arm)} for name, arm in arms.items()}
    write_json(kept, costs)
    return costs


@dataclass(frozen=True)
class Job:
    """What a step costs depends on: the stage, the model and what training does with it. Arms may have a job in common."""

    stage: str
    model: tuple[tuple[str, Any], ...]
    evading: bool
    pull: bool


def jobs(arm: Arm) -> list[Job]:
    """The jobs of an arm, training first."""
    model = tuple(arm.model.items())
    train = Job("train", model, arm.evading, arm.pull)
    return [train, Job("pretrain", model, True, True)] if arm.ssrt else [train]


def _seconds_of_a_step(data: Dataset, job: Job, turn: int, folder: Path) -> float:
    """Process seconds that one more step of real training takes: a longer run less a shorter one, so without start and end."""
    few, many = (_seconds_of_a_run(data, job, turn, folder, steps) for steps in COST_STEPS)
    return (many - few) / (COST_STEPS[1] - COST_STEPS[0])


def _seconds_of_a_run(data: Dataset, job: Job, turn: int, folder: Path, steps: int) -> float:
    few = replace(data, train=data.train.subset(torch.arange(steps * BATCH) % len(data.train)), val=data.val.subset(torch.arange(2)))
    arm = Arm("", dict(job.model), evading=job.evading, pull=job.pull)
    config = pretrain_config(1.0, turn) if job.stage == "pretrain" else train_config(arm, 1.0, turn)
    target = folder / f"{time.monotonic_ns()}"
    started = time.process_time()
    run_stage(StageRun(config, replace(BASE, **arm.model), target, None), few, torch.device("cpu"))
    return time.process_time() - started


def meets_evading(arm: Arm) -> bool:
    """Whether the arm trains against attacks that avoid its detector: it needs one."""
    return arm.evading and replace(BASE, **arm.model).purification


def steps_for(name: str, arm: Arm, costs: Mapping[str, Mapping[str, float]], steps: int) -> tuple[int, int]:
    """(pretraining, training) steps that cost as much as ``steps`` training steps of all parts."""
    budget = steps * costs["all parts"]["train"]
    first = max(round(arm.ssrt * budget / costs[name]["pretrain"]), 1) if arm.ssrt else 0
    return first, max(round((1 - arm.ssrt) * budget / costs[name]["train"]), 1)


def trained(arm: Arm, seed: int, data: Dataset, steps: tuple[int, int], folder: Path) -> AMSDN:
    """The arm's model of one seed, from its folder if it has been trained."""
    device, start = torch.device("cpu"), None
    model = replace(BASE, **arm.model)
    if arm.ssrt:
        config = pretrain_config(steps[0] / (len(data.train) // BATCH), seed)
        start = run_stage(StageRun(config, model, folder / "pretrain", None), data, device)
    if arm.labels is not None:
        data = replace(data, train=data.train.subset(balanced_first(data.train.labels, arm.labels)))
    config = train_config(arm, steps[1] / (len(data.train) // BATCH), seed)
    return load_model(run_stage(StageRun(config, model, folder / "train", start), data, device))


def judged(model: AMSDN, data: Dataset, folder: Path, samples: int, attacks: Mapping[str, Attack]) -> dict[str, Any]:
    """Clean accuracy on all validation images; on the first ``samples`` what stands, what is noticed and what is certified. Counts."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, Any] = {"clean": clean_accuracy(model, data.val, torch.device("cpu"))}
    rows = evaluate(model, data.val, attacks, folder, EvaluateConfig(keep_examples=0), sample_ids=range(samples))
    for attack in ("clean", *attacks):
        mine = [r for r in rows if r.attack == attack]
        noticed = [r.correct or bool(r.detected) for r in mine]
        found[f"under {attack}"] = {"correct": sum(r.correct for r in mine), "correct_or_noticed": sum(noticed), "samples": len(mine)}
        found[f"under {attack}"]["alarms"] = sum(bool(r.detected) for r in mine)
    return found


def certified(model: AMSDN, data: Dataset, folder: Path, samples: int) -> dict[str, int]:
    """How many of the first ``samples`` validation images are right and certified under 3x3 masks."""
    certifier = PatchCertifier(PatchDefence(PATCH, 3).around(model))
    proofs = certify_split(certifier, data.val, folder, model=model, sample_ids=range(samples))
    proofs = [p for p in proofs if p.certificate == "patch"]
    return {"correct": sum(p.correct and p.radius >= 1 for p in proofs), "samples": len(proofs)}


def fitting(attacks: Mapping[str, Attack], model: AMSDN) -> dict[str, Attack]:
    """Without the attacks that avoid a detector where there is none."""
    return {name: attack for name, attack in attacks.items() if model.has_detector or not attack.evades}


def folder_of(name: str) -> str:
    """The name of an arm's folder."""
    return name.replace(" ", "-").replace(",", "")


def runs(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Every arm and seed that was asked for, seed by seed, so that a run cut short has whole comparisons."""
    for seed in options.seeds:
        for name in options.arms:
            yield name, seed


def benchmark(options: argparse.Namespace) -> None:
    """Train and judge whatever is missing, a JSON file a run."""
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = load_dataset("cifar10", root=options.data_root, limit=options.limit)
    costs = measured_costs(data, ARMS, options.work, options.cost_rounds)
    for name, seed in runs(options):
        folder = options.work / folder_of(name) / str(seed)
        if (folder / "result.json").exists():
            continue
        steps = steps_for(name, ARMS[name], costs, options.steps)
        started = time.monotonic()
        model = trained(ARMS[name], seed, data, steps, folder)
        attacks = judges(options.scale)
        found = judged(model, data, folder / "judged", options.samples, fitting(attacks, model))
        found["certified"] = certified(model, data, folder / "judged", options.samples)
        parameters = sum(p.numel() for p in model.parameters())
        origin = provenance(torch.device("cpu"), steps=steps, parameters=parameters, minutes=(time.monotonic() - started) / 60)
        write_json(
            folder / "result.json", {"arm": name, "about": ARMS[name].about, "seed": seed, "costs": costs[name], **origin, "found": found}
        )
        print(f"{name}, seed {seed}: {found}", flush=True)


def gather(options: argparse.Namespace) -> dict[str, Any]:
    """All results there are under ``options.work``, each with its own provenance, and with what consistency made of it if that was measured."""
    found = [read_json(p) for p in sorted(options.work.glob("*/*/result.json"))]
    for row, path in zip(found, sorted(options.work.glob("*/*/result.json")), strict=True):
        if (beside := path.parent / "consistency.json").exists():
            row["consistency"] = read_json(beside)
    settings = {name: getattr(options, name) for name in ("steps", "samples", "scale")}
    settings |= {"ssrt_share": SSRT_SHARE, "patch": PATCH, "pixels": PIXELS, "batch": BATCH}
    return {"settings": settings, "costs": read_json(options.work / "costs.json"), "rows": found}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="where CIFAR-10 lies (default: AMSDN_DATA or data/)")
    parser.add_argument("--limit", type=int, help="use at most this many images of every split (a dry run)")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="where runs are kept")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of all parts; what they cost is everyone's budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--samples", type=int, default=300, help="validation images that are attacked")
    parser.add_argument("--scale", type=float, default=1.0, help="of the attacks' steps and queries")
    parser.add_argument("--cost-rounds", type=int, default=3, help="of measuring what a step costs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/ablations.json"))
    options = parser.parse_args(arguments)
    benchmark(options)
    write_json(options.out, gather(options))
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
