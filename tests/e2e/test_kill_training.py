"""A three-stage run killed by SIGKILL ends with the weights, curves and records of an undisturbed one: scripts/chaos.py, small."""

import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "chaos.py"
    spec = importlib.util.spec_from_file_location("chaos_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_as_an_undisturbed_one(
    chaos: ModuleType, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def commands(out: Path) -> list[list[str]]:
        fields = ["--data", f"arrays:{arrays}", "--device", "cpu", "--model.width", "4", "--out", str(out)]
        loop = ["--loop.epochs", "2", "--loop.batch-size", "8", "--loop.checkpoint-every-s", "0.05", "--loop.log-every", "1"]
        return [[stage, *fields, *loop] for stage in chaos.STAGES]

    moments = [chaos.Moment(0, "step"), chaos.Moment(1, "save"), chaos.Moment(2, "checkpoint")]
    found = chaos.chaos(commands, tmp_path, moments, random.Random(0), every=1)
    assert found["kills"] == found["fresh_interpreters"] == 3
    right = {"weights": True, "curve": True, "record": True, "clean": True}
    assert found["equal"] == dict.fromkeys(chaos.STAGES, right), (tmp_path / "log.txt").read_text()


def test_kills_are_spread_over_all_stages_and_phases(chaos: ModuleType) -> None:
    moments = chaos.plan(50, random.Random(0))
    assert len(moments) == 50
    assert [m.stage for m in moments] == sorted(m.stage for m in moments)
    assert min(Counter(m.stage for m in moments).values()) >= 16
    assert {m.phase for m in moments} == {*chaos.EARLY, *chaos.LATE}
    for stage in range(3):
        phases = [m.phase for m in moments if m.stage == stage]
        late = len(phases) // 3
        assert set(phases[:-late]) == set(chaos.EARLY)  # a kill after the last step leaves none to kill at
        assert set(phases[-late:]) <= set(chaos.LATE)
    assert chaos.Moment(2, "done") not in moments  # nothing follows it


def finished(folder: Path, stages: tuple[str, ...]) -> Path:
    """Three stages as training leaves them."""
    for stage in stages:
        (folder / stage / "model").mkdir(parents=True)
        (folder / stage / "model" / "model.safetensors").write_bytes(b"weights")
        (folder / stage / "history.jsonl").write_text('{"step": 1, "seconds": 3.0, "loss": 0.5}\n')
        record = dict.fromkeys(("model", "data", "steps", "images", "config", "clean_accuracy_val"), 1)
        (folder / stage / "run.json").write_text(json.dumps(record | {"seconds": 3.0}))
    return folder


@pytest.mark.parametrize("broken", ["weights", "curve", "record", "clean", "nothing"])
def test_any_difference_is_seen(broken: str, chaos: ModuleType, tmp_path: Path) -> None:
    whole, cut = (finished(tmp_path / name, chaos.STAGES) for name in ("whole", "cut"))
    (cut / "train" / "history.jsonl").write_text('{"step": 1, "seconds": 4.0, "loss": 0.5}\n')  # seconds may differ
    if broken == "weights":
        (cut / "train" / "model" / "model.safetensors").write_bytes(b"Weights")
    elif broken == "curve":
        (cut / "train" / "history.jsonl").write_text('{"step": 1, "seconds": 3.0, "loss": 0.25}\n')
    elif broken == "record":
        (cut / "train" / "run.json").write_text((cut / "train" / "run.json").read_text().replace('"steps": 1', '"steps": 2'))
    elif broken == "clean":
        (cut / "train" / ".training_state.pt.7.partial").touch()
    found = chaos.compare(whole, cut)
    assert [name for name, fine in found["train"].items() if not fine] == ([] if broken == "nothing" else [broken])
    assert all(found["pretrain"].values())
    assert all(found["finetune"].values())
