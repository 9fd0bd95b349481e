"""Certify a split sample by sample and write down what was claimed (one CertRecord per sample and certificate).

The methods are ``Certifier`` objects: ``smoothing_certifier`` (l2), ``patch_certificate``, ``l0_certificate``. This engine feeds them
samples, writes each row as it is known, skips what is there already, and splits the work into shards. In the run folder:

- ``cert_config.<method>.json``: what must be the same for a run to be resumed, one file per method,
- ``cert.jsonl``, or ``cert.<i>-of-<n>.jsonl`` for one shard of n: the rows; ``read_certificates`` reads them all as one.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from amsdn.evaluation.certifier import ABSTAIN, KINDS, Certifier, Claim, Sample
from amsdn.evaluation.run_folder import Samples, choose_ids, claim, data_fingerprint, model_fingerprint, writing_to
from amsdn.evaluation.shards import WHOLE, Shard, read_shards
from amsdn.protocols import check_eval_mode, check_images, device_of
from amsdn.records import CertRecord, RecordLog, canonical, config_hash

RECORDS = "cert.jsonl"
ALL_SETTINGS = "cert_config*.json"


def certify_split(
    certifier: Certifier,
    split: Samples,
    out: Path,
    *,
    model: nn.Module | None = None,
    sample_ids: Sequence[int] | None = None,
    shard: Shard = WHOLE,
    progress: bool = True,
) -> list[CertRecord]:
    """Certify the samples into ``out`` and return their rows, by sample and then by certificate.

    A run that was killed and is started again with the same arguments ends with the same rows (but for ``seconds``), and a
    later run may add samples. With ``shard = Shard(i, n)`` only every n-th sample, from the i-th, is certified and returned, into a
    file of its own; n processes that share ``out`` do the whole, and a call without a shard then finds nothing left to do.

    ``model`` is what ``out`` belongs to, where the certifier works on a variant of it (an AMSDN without its light consistency).

    Raises InputError where ``out`` holds certificates of another model, data set or configuration, or the model is in train mode.
    """
    check_eval_mode(certifier.model, "certify")
    ids = shard.of(choose_ids(split, sample_ids))
    keys = {kind: config_hash(kind, certifier.config) for kind in certifier.kinds}
    settings = {
        "model": model_fingerprint(model or certifier.model),
        "data": data_fingerprint(split),
        "configuration": canonical(certifier.config),
    }
    with writing_to(out):
        claim(out, f"cert_config.{certifier.kinds[0]}.json", settings)
        log = RecordLog(out / shard.file(RECORDS), CertRecord)
    known = read_shards(out, RECORDS, CertRecord)
    missing = [i for i in ids if any((i, key, certifier.seed) not in known for key in keys.values())]
    labels: dict[int, int] = {}
    headline = keys[certifier.kinds[0]]
    useful = [row.correct and row.radius > 0 for i in ids if (row := known.get((i, headline, certifier.seed)))]
    with tqdm(
        total=len(ids), initial=len(ids) - len(missing), desc=f"certify {certifier.kinds[0]}", unit="image", disable=not progress
    ) as bar:
        for sample_id, claims in certifier.certify(_samples(certifier, split, missing, labels)) if missing else ():
            assert sample_id in labels, f"{_name(certifier)} claimed something twice, or of a sample it was not given: {sample_id}"
            assert set(claims) == set(certifier.kinds), f"{_name(certifier)} claimed {sorted(claims)}, not {sorted(certifier.kinds)}"
            label = labels.pop(sample_id)
            rows = [_row(sample_id, kind, keys[kind], certifier.seed, label, claims[kind]) for kind in certifier.kinds]
            fresh = [row for row in rows if row.key not in known]
            with writing_to(out):
                log.append(fresh)
            known.update((row.key, row) for row in fresh)
            useful.append(rows[0].correct and rows[0].radius > 0)
            bar.update()
            bar.set_postfix_str(f"right and certified {sum(useful) / len(useful):.1%}", refresh=False)
    wanted = [(i, keys[kind], certifier.seed) for i in ids for kind in certifier.kinds]
    lost = sorted({key[0] for key in wanted if key not in known})
    assert not lost, f"{_name(certifier)} claimed nothing of samples {lost[:5]}"
    return [known[key] for key in wanted]


def read_certificates(out: Path) -> list[CertRecord]:
    """All certificates of a run folder, those of every shard, by kind and sample; of a sample that two shards certified, one row.

    Raises InputError where a file is broken or two rows of one key claim different things.
    """
    place = {kind: i for i, kind in enumerate(KINDS)}
    rows = read_shards(out, RECORDS, CertRecord).values()
    return sorted(rows, key=lambda row: (place.get(row.certificate, len(KINDS)), row.sample_id))


def _samples(certifier: Certifier, split: Samples, ids: Sequence[int], labels: dict[int, int]) -> Iterator[Sample]:
    """One sample after the other, read when it is asked for; its label goes to ``labels``, where the certifier does not see it."""
    device = device_of(certifier.model)
    for i in ids:
        images, y = split.fetch(torch.tensor([i]))
        check_images(images, f"sample {i}")
        labels[i] = int(y[0])
        yield Sample(i, images[0].to(device))


def _row(sample_id: int, kind: str, key: str, seed: int, label: int, claimed: Claim) -> CertRecord:
    sensible = claimed.prediction >= 0 <= claimed.radius < math.inf  # not so for NaN
    assert sensible or (claimed.prediction, claimed.radius) == (ABSTAIN, 0), f"sample {sample_id}: not a claim: {claimed}"
    return CertRecord(
        sample_id=sample_id,
        config_hash=key,
        seed=seed,
        certificate=kind,
        label=label,
        prediction=claimed.prediction,
        radius=claimed.radius,
        correct=claimed.prediction == label,
        samples=claimed.samples,
        seconds=round(claimed.seconds, 6),
    )


def _name(certifier: Certifier) -> str:
    return type(certifier).__name__


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["certify", *sys.argv[1:]]))
