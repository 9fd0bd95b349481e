"""``amsdn certify`` killed with SIGKILL at random moments and started again: the records of an undisturbed run."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amsdn.commands.common import read_json, write_about
from amsdn.data import load_dataset
from amsdn.evaluation.certification import read_certificates
from amsdn.models.amsdn import AMSDN
from amsdn.models.double_masking import DoubleMasking
from amsdn.models.storage import save_model
from amsdn.records import CertRecord, EvalRecord, read_records

from .conftest import Shell

SAMPLES = 8
CHEAPLY = [
    *("--data", "digits", "--limit", "40", "--samples", str(SAMPLES), "--device", "cpu"),
    *("--smoothing.n0", "10", "--smoothing.n", "400", "--smoothing.block", "10", "--smoothing.batch-size", "20"),
    *("--smoothing.radii", "0.02", "0.1", "0.2", "--recheck.steps", "2", "--recheck.draws", "2", "--recheck.n", "20"),
    *("--patch.size", "6", "--patch.masks-per-axis", "3", "--patch.confidence", "0.2", "--pixels.rows", "3", "--pixels.columns", "3"),
    *("--attacks.samples", "4", "--attacks.steps", "2", "--attacks.queries", "4", "--attacks.pixels", "1", "2"),
]


@pytest.fixture
def digits_model(tmp_path: Path) -> Path:
    """An untrained tiny AMSDN for ten classes, whose logits lie far enough apart to certify some images and not others."""
    data = load_dataset("digits", limit=40)
    images, _ = data.test.fetch(torch.arange(SAMPLES))
    for seed in range(50):
        model = untrained(seed)
        with torch.no_grad():
            masking = DoubleMasking(model, 6, 3, model.mask_fill)
            proved = masking.certified(images, masking(images).argmax(1))
        if 0 < proved.sum() < SAMPLES:
            break
    save_model(model, tmp_path / "model")
    write_about(tmp_path / "model", data)
    return tmp_path / "model"


def untrained(seed: int) -> AMSDN:
    torch.manual_seed(seed)
    model = AMSDN(num_classes=10, variant="compact", width=2, fpn_channels=8).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(8)
    return model


def certifying(model: Path, out: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "amsdn", "certify", "--model", str(model), "--out", str(out), *CHEAPLY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums must split the same way in both runs
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def kill_when(pattern: str, rows: int, model: Path, out: Path) -> None:
    """Start the command and kill it once the files of this pattern hold that many rows."""
    process = certifying(model, out)
    try:
        while process.poll() is None:
            if sum(path.read_bytes().count(b"\n") for path in out.glob(pattern)) >= rows:
                process.kill()
                assert process.wait() != 0, "the run ended before it could be killed"
                return
            time.sleep(0.001)
        raise AssertionError(f"the run ended before it could be killed: {process.communicate()}")
    finally:
        process.kill()
        process.communicate()


def rows_of(out: Path) -> tuple[list[CertRecord], dict[str, list[EvalRecord]]]:
    attacks = {str(path.relative_to(out)): read_records(path, EvalRecord) for path in sorted(out.glob("*-defence/*/eval.jsonl"))}
    return [replace(row, seconds=0.0) for row in read_certificates(out)], attacks


@pytest.mark.slow
def test_a_killed_certification_ends_with_the_records_of_an_undisturbed_one(amsdn: Shell, digits_model: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = amsdn("certify", "--model", digits_model, "--out", undisturbed, *CHEAPLY)
    finally:
        torch.set_num_threads(threads)
    assert whole.code == 0, whole
    moment = random.Random(4)
    kill_when("cert.jsonl", moment.randint(1, SAMPLES - 1), digits_model, killed)  # at work on l2
    kill_when("patch-defence/*/eval.jsonl", moment.randint(1, 8), digits_model, killed)  # under attack, with l0 still to come
    last = certifying(digits_model, killed)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors

    (certificates, attacks), (expected, expected_attacks) = rows_of(killed), rows_of(undisturbed)
    assert certificates == expected
    assert attacks == expected_attacks
    assert len(expected) == 4 * SAMPLES
    assert len(expected_attacks) == 2
    checks = [read_json(out / "crosscheck.json") for out in (killed, undisturbed)]
    assert checks[0] == checks[1]
    assert not list(killed.rglob("*.partial"))
    by_kind = {kind: {row.radius for row in expected if row.certificate == kind} for kind in ("l2", "patch", "patch-detection", "l0")}
    assert all(max(radii) > 0 for radii in by_kind.values()), by_kind
    assert len({row.samples for row in expected if row.certificate == "l2"}) > 1, "not sequential"
