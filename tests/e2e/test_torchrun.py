"""``torchrun`` divides evaluation and certification: two processes leave behind what one does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amsdn.evaluation.certification import read_certificates

from .conftest import Outcome, Shell
from .test_pipeline import CHEAPLY

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "amsdn"]
TIME_LIMIT_S = 600


def torchrun(*args: object) -> Outcome:
    """``amsdn ARGS`` in two processes, in a folder where its code is found as it is here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*TORCHRUN, *map(str, args)], capture_output=True, text=True, timeout=TIME_LIMIT_S, env=environment)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What one process does here, it does with as many threads as each of the two: sums are rounded in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_files(out: Path) -> dict[str, bytes]:
    """All that must be the same: not run.json, which tells times, nor what each process wrote for itself."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and "-of-" not in p.name and p.name != "run.json"]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.mark.slow
def test_two_processes_evaluate_like_one(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    words = ["--model", model_folder, "--data", f"arrays:{arrays}", "--device", "cpu", "--attacks", "patch-pgd-4", "sparse-pgd-5"]
    words += ["--evaluate.batch-size", "3"]  # four chunks, pictures from three
    one = amsdn("evaluate", *words, "--out", tmp_path / "one")
    two = torchrun("evaluate", *words, "--out", tmp_path / "two")
    assert (one.code, two.code) == (0, 0), two.err
    assert run_files(tmp_path / "two") == run_files(tmp_path / "one")
    assert {p.name for p in (tmp_path / "two").glob("eval.*-of-*")} == {"eval.1-of-2.jsonl", "eval.2-of-2.jsonl"}
    assert two.out.replace(str(tmp_path / "two"), "OUT") == one.out.replace(str(tmp_path / "one"), "OUT")  # one of them prints
    told = json.loads((tmp_path / "two" / "run.json").read_text())
    assert set(told["shards"]) == {"1/2", "2/2"}
    assert told["seconds"]["evaluate"] >= sum(part["seconds"]["evaluate"] for part in told["shards"].values())


@pytest.mark.slow
def test_two_processes_certify_like_one(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    words = ["certify", "--model", model_folder, "--data", f"arrays:{arrays}", "--device", "cpu", "--samples", "5", *CHEAPLY]
    one = amsdn(*words, "--out", tmp_path / "one")
    two = torchrun(*words, "--out", tmp_path / "two")
    assert (one.code, two.code) == (0, 0), two.err
    assert not (tmp_path / "two" / "cert.jsonl").exists()  # nothing was left for the first to do
    rows, expected = ([replace(row, seconds=0.0) for row in read_certificates(tmp_path / folder)] for folder in ("two", "one"))
    assert rows == expected
    assert len(rows) == 4 * 5
    checks = [json.loads((tmp_path / folder / "crosscheck.json").read_text()) for folder in ("two", "one")]
    assert checks[0] == checks[1]
    assert two.out.count("cross-check") == 1
