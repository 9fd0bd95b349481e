"""``torchrun`` trains: a process that dies ends the others with one line, and a restart goes on to the same end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amsdn.training.history import HISTORY_FILE, read_history
from amsdn.training.ranks import ProcessGone

from .conftest import Shell

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
TIME_LIMIT_S = 600


def words(arrays: Path, out: Path) -> list[str]:
    """Plain supervised steps: what is tried here is the processes, not the attacks."""
    fields = [
        "--clean-start",
        "1",
        "--loop.epochs",
        "6",
        "--loop.batch-size",
        "8",
        "--loop.checkpoint-every-s",
        "0",
        "--loop.log-every",
        "1",
    ]
    fields += ["--loop.optimizer", "sgd", "--loop.mixed-precision", "False"]  # rounding to bf16 would magnify that of sums
    fields += ["--model.width", "4", "--device", "cpu"]
    return ["train", "digits-demo", "--data", f"arrays:{arrays}", "--init", "none", "--out", str(out), *fields]


@contextlib.contextmanager
def torchrun(*options: str) -> Iterator[subprocess.Popen[str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen([*launcher, *options], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def worker(launcher: int, rank: int) -> int:
    """The process id of the worker of that rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no worker of rank {rank}")


def kill_after_some_steps(launcher: int, history: Path) -> None:
    deadline = time.monotonic() + TIME_LIMIT_S
    while not (history.exists() and history.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline, "no step in sight"
        time.sleep(0.01)
    os.kill(worker(launcher, 1), signal.SIGKILL)


def test_a_process_that_is_gone_is_one_line_and_exit_code_one(amsdn: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Sequence[str]) -> None:
        raise ProcessGone("process 1 of 2 is gone")

    monkeypatch.setattr("amsdn.commands.train.run", run)
    outcome = amsdn("train")
    assert (outcome.code, outcome.err) == (1, "amsdn train: process 1 of 2 is gone\n")


def test_an_incomplete_environment_is_one_line(amsdn: Shell, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    outcome = amsdn(*words(arrays, tmp_path))
    assert outcome.code == 2
    assert outcome.err.startswith("amsdn train: several processes: they cannot meet (")
    assert outcome.err.count("\n") == 1
    assert "start them with torchrun" in outcome.err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_a_killed_process_ends_the_others_and_a_restart_ends_as_an_undisturbed_run(amsdn: Shell, arrays: Path, tmp_path: Path) -> None:
    history = tmp_path / "two" / "train" / HISTORY_FILE
    with torchrun("-m", "amsdn", *words(arrays, tmp_path / "two")) as process:
        kill_after_some_steps(process.pid, history)
        _, told = process.communicate(timeout=TIME_LIMIT_S)
    assert process.returncode == 1
    assert told.count("amsdn train: process 1 of 2 (counted from 0) is gone; start again, or use torchrun --max-restarts, to go on") == 1
    assert not (tmp_path / "two" / "train" / "model").exists(), "it ended before it could be killed"
    history.unlink()  # so that the next kill, too, comes after some steps
    with torchrun("--max-restarts", "1", "-m", "amsdn", *words(arrays, tmp_path / "two")) as process:
        kill_after_some_steps(process.pid, history)
        _, told = process.communicate(timeout=TIME_LIMIT_S)
    assert process.returncode == 0, told
    whole = amsdn(*words(arrays, tmp_path / "one"), "--loop.parts", "2")
    assert whole.code == 0, whole.err
    two, one = (load_file(tmp_path / run / "train" / "model" / "model.safetensors") for run in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    rows = read_history(history)
    assert [row["step"] for row in rows] == list(range(rows[0]["step"], rows[-1]["step"] + 1))
