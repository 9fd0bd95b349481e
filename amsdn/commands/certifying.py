"""Certifying one model into a run folder, attacking what was certified: what ``certify`` and the demo share.

The attacks on the certified classifiers for patches and pixels have run folders of their own inside, ``patch-defence`` and
``l0-defence``: they are other classifiers than the model whose rows lie in the run folder itself.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from amsdn.attacks import Attack, PGDL2Attack
from amsdn.commands.measuring import Measured, check_same_model, update_run_json
from amsdn.evaluation.certification import WHOLE, Shard, certify_split
from amsdn.evaluation.certifier import Certifier
from amsdn.evaluation.crosscheck import DEFENCE_RUNS, Checked, conclude, cross_check
from amsdn.evaluation.evaluate import EvaluateConfig, evaluate
from amsdn.evaluation.l0_certificate import L0Certifier
from amsdn.evaluation.patch_certificate import PatchCertifier
from amsdn.evaluation.smoothing import SmoothedClassifier
from amsdn.evaluation.smoothing_attack import RecheckConfig, checked, recheck_smoothed
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.recipes.defences import DefenceAttacks, PatchDefence, PixelDefence
from amsdn.records import CertRecord, canonical

Kind = Literal["l2", "patch", "l0"]
KINDS: tuple[Kind, ...] = ("l2", "patch", "l0")


@dataclass(frozen=True)
class Certifying:
    """How each certificate is made and attacked."""

    smoothing: SmoothingConfig = SmoothingConfig()
    recheck: RecheckConfig = RecheckConfig()  # attacks on the smoothed classifier
    patch: PatchDefence = PatchDefence()
    pixels: PixelDefence = PixelDefence()
    attacks: DefenceAttacks = DefenceAttacks()  # on the other two certified classifiers


def certify(run: Measured, kinds: Sequence[Kind], how: Certifying, samples: int | None, shard: Shard = WHOLE) -> list[CertRecord]:
    """Certify the first ``samples`` test images (None: all), attack what was certified, and write both.

    One shard of several only certifies; the call without a shard, once all are done, attacks. Raises CertificateViolation,
    after everything is on disk, where an attack refutes a certificate.
    """
    check_same_model(run)
    count = min(samples or len(run.dataset.test), len(run.dataset.test))
    certificates: list[CertRecord] = []
    results: list[Checked] = []
    for kind in dict.fromkeys(kinds):
        started = time.monotonic()
        job = _job(kind, run.model, how)
        rows = certify_split(job.certifier, run.dataset.test, run.out, sample_ids=range(count), shard=shard)
        certificates += rows
        if shard != WHOLE:
            continue
        results += _attack_smoothed(run, rows, how) if job.defence is None else _attack_defence(run, kind, job, rows, how.attacks.samples)
        about = {"settings": canonical(job.settings), "attacks": canonical(job.attacks or how.recheck)}
        update_run_json(run, f"certify {kind}", seed=job.certifier.seed, samples=count, seconds=time.monotonic() - started, **about)
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


def _job(kind: Kind, model: nn.Module, how: Certifying) -> _Job:
    if kind == "l2":
        return _Job(SmoothingCertifier(model, how.smoothing), how.smoothing)
    if kind == "patch":
        masking = how.patch.around(model)
        return _Job(PatchCertifier(masking), how.patch, masking, how.attacks.on_patches(how.patch.size))
    partition = how.pixels.around(model)
    return _Job(L0Certifier(partition), how.pixels, partition, how.attacks.on_pixels())


def _attack_smoothed(run: Measured, rows: Sequence[CertRecord], how: Certifying) -> list[Checked]:
    """Attacks inside the certified balls, on the smoothed classifier itself and from what fools the base classifier."""
    smoothed = SmoothedClassifier(run.model, how.smoothing.sigma, how.smoothing.batch_size)
    base = {"pgd-l2": PGDL2Attack(epsilon=how.smoothing.sigma, alpha=how.smoothing.sigma / 4, num_steps=20)}
    checks = recheck_smoothed(smoothed, run.dataset.test, rows, base, how.recheck)
    return [checked(checks, how.smoothing.alpha, how.recheck.alpha)]


def _attack_defence(run: Measured, kind: Kind, job: _Job, rows: Sequence[CertRecord], samples: int) -> list[Checked]:
    """Attack the certified classifier on the first ``samples`` of the certified images, and compare with its certificates.

    The same folder as before goes on if nothing has changed; other attacks or another defence get one of their own.
    """
    assert job.defence is not None
    ids = list(dict.fromkeys(row.sample_id for row in rows))[:samples]
    out = run.out / DEFENCE_RUNS[kind]
    attacked = evaluate(job.defence, run.dataset.test, job.attacks, out, EvaluateConfig(keep_examples=0), sample_ids=ids)
    return cross_check(attacked, rows)
