"""A training run killed by SIGKILL at random moments ends with the weights of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(stage: str, arrays: Path, out: Path) -> list[str]:
    fields = ["--loop.epochs", "4", "--loop.batch-size", "8", "--loop.checkpoint-every-s", "0.05", "--model.width", "4"]
    return [sys.executable, "-m", "amsdn", stage, "--data", f"arrays:{arrays}", "--out", str(out), *fields]


def run_to_the_end(words: list[str]) -> None:
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def kill_at_a_random_moment(words: list[str], folder: Path, rng: random.Random) -> bool:
    """Start the command, wait until it has begun to train, kill it a little later; whether it was still running."""
    state = folder / "training_state.pt"
    before = state.stat().st_mtime_ns if state.exists() else 0
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (state.stat().st_mtime_ns if state.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        running = process.poll() is None
        process.send_signal(signal.SIGKILL)
    return running


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train"])
def test_training_killed_again_and_again(stage: str, arrays: Path, tmp_path: Path) -> None:
    run_to_the_end(command(stage, arrays, tmp_path / "whole"))
    words, rng = command(stage, arrays, tmp_path / "cut"), random.Random(0)
    kills = sum(kill_at_a_random_moment(words, tmp_path / "cut" / stage, rng) for _ in range(3))
    assert kills >= 1, "every run ended before it could be killed"
    run_to_the_end(words)
    whole, cut = (load_file(tmp_path / run / stage / "model" / "model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
