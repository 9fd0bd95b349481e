"""Stages under a time budget, a number of classes that does not fit, and records that survive a kill at the worst moment."""

import itertools
import json
from pathlib import Path

import pytest

from amsdn.commands import stages
from amsdn.training import budget

from .conftest import Shell
from .test_bad_input import refused

TINY = ["--loop.batch-size", "20", "--model.width", "2", "--model.fpn-channels", "8"]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which every rehearsed step takes a tenth of a second."""
    monkeypatch.setattr(budget, "_synchronised", lambda device: itertools.count(step=0.1).__next__)


@pytest.mark.usefixtures("steady")
def test_a_budget_decides_the_steps_and_a_second_start_keeps_them(amsdn: Shell, arrays: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ["pretrain", "--data", f"arrays:{arrays}", "--out", out, *TINY]
    first = amsdn(*common, "--budget", "4s")
    assert first.code == 0, first
    told = next(line for line in first.err.splitlines() if "steps fit into 4s" in line)
    assert told.startswith("pretrain: ")
    plan, info = (json.loads((out / "pretrain" / name).read_text()) for name in ("budget.json", "run.json"))
    assert info["budget"] == plan
    assert f"{plan['steps']} steps fit" in told
    assert plan["step_s"] == pytest.approx(0.1)
    assert info["config"]["loop"]["epochs"] == plan["steps"] / 2  # sixty images less the held-out ones
    weights = (out / "pretrain" / "model" / "model.safetensors").read_bytes()
    assert amsdn(*common, "--budget", "4s").code == 0
    assert (out / "pretrain" / "model" / "model.safetensors").read_bytes() == weights
    refused(amsdn(*common, "--budget", "3s"), "planned for --budget 4s, not 3s")
    refused(amsdn(*common), "begun with --budget 4s")


@pytest.mark.usefixtures("steady")
def test_a_budget_that_is_no_time_or_too_small_leaves_nothing_behind(amsdn: Shell, arrays: Path, tmp_path: Path) -> None:
    common = ["train", "--data", f"arrays:{arrays}", "--out", tmp_path / "out", *TINY]
    refused(amsdn(*common, "--budget", "soon"), "--budget soon", "90s, 10min or 1.5h")
    refused(amsdn(*common, "--budget", "9s", "--loop.epochs", "2"), "give it or --loop.epochs, not both")
    refused(amsdn("demo", "--budget", "soon", "--out", tmp_path / "out"), "--budget soon")
    outcome = amsdn(*common, "--budget", "0.1s")
    assert outcome.code == 2, outcome
    assert "should do" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_another_number_of_classes_than_the_datas_is_refused_only_if_asked_for(amsdn: Shell, arrays: Path, tmp_path: Path) -> None:
    common = ["train", "--data", f"arrays:{arrays}", "--out", tmp_path / "out", "--loop.epochs", "0.4", *TINY]
    for words in (["--model.num-classes", "10"], ["--model.num_classes=3"]):
        refused(amsdn(*common, *words), "--model.num-classes", "has 2 classes")
    assert not (tmp_path / "out").exists()
    assert amsdn(*common, "--model.num-classes", "2").code == 0


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("unwritten", ["save_model", "write_about", "write_json"])
def test_a_stage_killed_while_it_writes_its_results_records_the_same(
    unwritten: str, amsdn: Shell, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    def words(out: str) -> list[object]:
        return ["train", "--data", f"arrays:{arrays}", "--out", tmp_path / out, "--loop.epochs", "1", *TINY]

    with monkeypatch.context() as patched:
        patched.setattr(stages, unwritten, killed)
        with pytest.raises(Killed):
            amsdn(*words("cut"))
    for out in ("cut", "whole"):
        assert amsdn(*words(out)).code == 0
    cut, whole = (tmp_path / out / "train" for out in ("cut", "whole"))
    assert (cut / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    found, expected = (json.loads((folder / "run.json").read_text()) for folder in (cut, whole))
    assert found["model"] == expected["model"]
    assert found["clean_accuracy_val"] == expected["clean_accuracy_val"]
    assert found["seconds"] > 0.05  # what the first process spent on training, though the second only read it
