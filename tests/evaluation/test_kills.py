"""Evaluation and certification killed with SIGKILL at random moments and started again: same rows, none lost or doubled."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_toys import Linear, PairCertifier, images

from amsdn.evaluation import certification, evaluate
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.records import CertRecord, EvalRecord, read_records

SAMPLES, CHUNK = 40, 2
SMOOTHING = SmoothingConfig(sigma=0.1, radii=(0.0, 0.05, 0.1, 0.15), n0=10, n=200, alpha=0.01, block=10, batch_size=30)

# Every chunk and every sample takes a little longer than it must, so that a kill finds the run at work.
PROGRAM = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_kills import run
from evaluation_toys import Linear
class Slow(Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)
Slow.__module__, Slow.__qualname__ = Linear.__module__, Linear.__qualname__
print("started", flush=True)
run(Slow(), Path(sys.argv[1]))
"""


def run(model: Linear, out: Path) -> None:
    """Evaluate, then certify by a sequential and by a deterministic method, into one folder."""
    from evaluation_toys import FlipPixels

    split = images(SAMPLES, model)
    attacks = {"flip-2": FlipPixels(2), "flip-20": FlipPixels(20)}
    evaluate.evaluate(model.eval(), split, attacks, out, evaluate.EvaluateConfig(batch_size=CHUNK), progress=False)
    certification.certify_split(SmoothingCertifier(model.eval(), SMOOTHING), split, out, progress=False)
    certification.certify_split(PairCertifier(model.eval()), split, out, progress=False)


def start(out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(path: Path, size: int, out: Path) -> bool:
    """Start the run, kill it once ``path`` has grown to ``size`` bytes; False if the run ended before."""
    process = start(out)
    try:
        while process.poll() is None:
            if path.exists() and path.stat().st_size >= size:
                process.kill()
                return process.wait() != 0
            time.sleep(0.001)
        return False
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_runs_end_with_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(Linear(), undisturbed)
    moments = random.Random(2)
    for name, spans in ((evaluate.RECORDS, [(0.05, 0.4), (0.5, 0.9)]), (certification.RECORDS, [(0.05, 0.3), (0.4, 0.9)])):
        whole = (undisturbed / name).stat().st_size  # of certificates, the first third by the sequential method
        for share in (moments.uniform(*span) for span in spans):
            assert kill_when(killed / name, round(share * whole), killed), "the run ended before it could be killed"
    last = start(killed)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors

    rows, expected = (read_records(out / evaluate.RECORDS, EvalRecord) for out in (killed, undisturbed))
    assert len(rows) == len({r.key for r in rows}) == 3 * SAMPLES
    assert rows == expected
    assert len(read_records(killed / certification.RECORDS, CertRecord)) == 3 * SAMPLES  # none twice; they lie there as they were decided
    assert len({c.samples for c in certification.read_certificates(undisturbed) if c.certificate == "l2"}) > 2, "not sequential"
    certificates, expected_certificates = (certification.read_certificates(out) for out in (killed, undisturbed))
    assert [(c.key, c.prediction, c.radius, c.correct, c.samples) for c in certificates] == [
        (c.key, c.prediction, c.radius, c.correct, c.samples) for c in expected_certificates
    ]
    for attack in ("flip-2", "flip-20"):
        assert (killed / "examples" / f"{attack}.npz").read_bytes() == (undisturbed / "examples" / f"{attack}.npz").read_bytes()
    assert not list(killed.rglob("*.partial"))
