"""Certifying one model into a run folder, attacking what was certified: what ``certify`` and the demo share.

The attacks on the certified classifiers for patches and pixels have run folders of their own inside, under ``patch-defence`` and
``l0-defence``: they are other classifiers than the model whose rows lie in the run folder itself. Other attacks, or the same on other
samples, get another folder there; ``crosscheck.json`` names the one that counts.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from amsdn.attacks import Attack, PGDL2Attack
from amsdn.commands.measuring import Measured, check_same_model, fitting, update_run_json
from amsdn.errors import InputError
from amsdn.evaluation.certification import certify_split
from amsdn.evaluation.certifier import Certifier
from amsdn.evaluation.crosscheck import DEFENCE_RUNS, Checked, conclude, cross_check
from amsdn.evaluation.evaluate import EvaluateConfig, evaluate
from amsdn.evaluation.l0_certificate import L0Certifier
from amsdn.evaluation.outcome import clean_outcome
from amsdn.evaluation.patch_certificate import PatchCertifier
from amsdn.evaluation.shards import WHOLE, Shard
from amsdn.evaluation.smoothing import SmoothedClassifier
from amsdn.evaluation.smoothing_attack import RecheckConfig, checked, recheck_smoothed
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.protocols import is_stochastic
from amsdn.recipes.defences import DefenceAttacks, PatchDefence, PixelDefence
from amsdn.recipes.recipe import Method
from amsdn.records import CertRecord, canonical, config_hash

PROBES = 4  # images that the model must answer, in company and alone, before anything is certified
BASE_QUERIES = 200  # of a search on the base classifier, where that has no gradients
ROUNDING = 0.02  # of the largest logit: what company may change, a little more than bfloat16 does


@dataclass(frozen=True)
class Certifying:
    """How each certificate is made and attacked."""

    smoothing: SmoothingConfig = SmoothingConfig()
    recheck: RecheckConfig = RecheckConfig()  # attacks on the smoothed classifier
    patch: PatchDefence = PatchDefence()
    pixels: PixelDefence = PixelDefence()
    attacks: DefenceAttacks = DefenceAttacks()  # on the other two certified classifiers


def certify(
    run: Measured, kinds: Sequence[Method], how: Certifying, samples: int | None, shard: Shard = WHOLE, *, progress: bool = True
) -> list[CertRecord]:
    """Certify the first ``samples`` test images (None: all), attack what was certified, and write both.

    One shard of several only certifies; the call without a shard, once all are done, attacks. Raises CertificateViolation,
    after everything is on disk, where an attack refutes a certificate; InputError, before anything is, where the model cannot be
    certified or a certificate does not fit it and the images.
    """
    check_same_model(run)
    torch.backends.cudnn.allow_tf32 = False  # certificates allow for the rounding of float32, not for that of ten bits
    count = min(samples or len(run.dataset.test), len(run.dataset.test))
    certificates: list[CertRecord] = []
    results: list[Checked] = []
    jobs = {kind: _job(kind, run.model, how) for kind in dict.fromkeys(kinds)}
    _check(run, jobs.values())
    for kind, job in jobs.items():
        started = time.monotonic()
        rows = certify_split(
            job.certifier, run.dataset.test, run.out, model=run.model, sample_ids=range(count), shard=shard, progress=progress
        )
        certificates += rows
        if shard.whole:
            results += (
                _attack_smoothed(run, rows, how) if job.defence is None else _attack_defence(run, kind, job, rows, how.attacks.samples)
            )
        about = {"settings": canonical(job.settings), "attacks": canonical(job.attacks or how.recheck)}
        seconds = time.monotonic() - started
        update_run_json(run, f"certify {kind}", shard, seed=job.certifier.seed, samples=count, seconds=seconds, **about)
    if results:
        conclude(run.out, results)
    return certificates


@dataclass(frozen=True)
class _Job:
    """One kind of certificate: what makes it, and the certified classifier with its attacks where it can be attacked like any other."""

    certifier: Certifier
    settings: SmoothingConfig | PatchDefence | PixelDefence
    defence: nn.Module | None = None
    attacks: Mapping[str, Attack] = field(default_factory=dict)


def _job(kind: Method, model: nn.Module, how: Certifying) -> _Job:
    if kind == "l2":
        return _Job(SmoothingCertifier(model, how.smoothing), how.smoothing)
    if kind == "patch":
        masking = how.patch.around(model)
        attacks = fitting(how.attacks.on_patches(how.patch.size), masking, how.attacks.queries)
        return _Job(PatchCertifier(masking), how.patch, masking, attacks)
    partition = how.pixels.around(model)
    return _Job(L0Certifier(partition), how.pixels, partition, fitting(how.attacks.on_pixels(), partition, how.attacks.queries))


def _attack_smoothed(run: Measured, rows: Sequence[CertRecord], how: Certifying) -> list[Checked]:
    """Attacks inside the certified balls, on the smoothed classifier itself and from what fools the base classifier."""
    smoothed = SmoothedClassifier(run.model, how.smoothing.sigma, how.smoothing.batch_size)
    base = {"pgd-l2": PGDL2Attack(epsilon=how.smoothing.sigma, alpha=how.smoothing.sigma / 4, num_steps=20)}
    checks = recheck_smoothed(smoothed, run.dataset.test, rows, fitting(base, run.model, BASE_QUERIES), how.recheck)
    return [checked(checks, how.smoothing.alpha, how.recheck.alpha)]


def _attack_defence(run: Measured, kind: Method, job: _Job, rows: Sequence[CertRecord], samples: int) -> list[Checked]:
    """Attack the certified classifier on the first ``samples`` of the certified images, and compare with its certificates.

    The folder of before goes on if neither samples nor attacks have changed; the defence cannot have, its certificates lie beside it.
    """
    assert job.defence is not None
    ids = list(dict.fromkeys(row.sample_id for row in rows))[:samples]
    folder = f"{DEFENCE_RUNS[kind]}/{config_hash(ids, dict(job.attacks))}"
    attacked = evaluate(job.defence, run.dataset.test, job.attacks, run.out / folder, EvaluateConfig(keep_examples=0), sample_ids=ids)
    return [replace(result, folder=folder) for result in cross_check(attacked, rows)]


def _check(run: Measured, jobs: Iterable[_Job]) -> None:
    """Ask the model and every certified classifier for a few answers. Raises InputError, before anything is written, where one cannot give them."""
    ids = list(range(min(PROBES, len(run.dataset.test))))
    x, y = (t.to(run.device) for t in run.dataset.test.fetch(torch.tensor(ids)))
    clean_outcome(run.model, x, y, ids)
    _check_alone(run.model, x)
    for job in jobs:
        if job.defence is not None:
            job.defence(x[:1])  # masks and parts that do not fit the images are refused here


@torch.no_grad()
def _check_alone(model: nn.Module, x: Tensor) -> None:
    """Raise InputError where the logits of images x [B,3,H,W] hang on what is beside them, or vary undeclared: every proof here says they do not."""
    alone = torch.cat([model(image[None]) for image in x]).float()
    if alone.shape[1] < 2:
        raise InputError("the model has one class, so there is nothing to certify; give a classifier of at least two")
    if is_stochastic(model):
        return
    change = float((model(torch.cat([x, 1 - x]))[: len(x)].float() - alone).abs().max() / alone.abs().max().clamp_min(1e-30))
    if not change <= ROUNDING:
        raise InputError(
            f"the model's logits for an image change by {change:.0%} with the images beside it or from call to call, so nothing can be "
            "certified; use fixed batch statistics, or declare stochastic = True for l2"
        )
