"""The learning curves that are committed are what their evidence gives; thinning keeps the means; drawing is deterministic."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def committed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("curves_script", ROOT / "scripts" / "curves.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(committed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(committed, "FOLDER", tmp_path / "results")
    return committed


def stage_folder(folder: Path, name: str, rows: int) -> Path:
    """A stage as a training command leaves it; attacks begin after a quarter of the run."""
    folder.mkdir()
    info: dict[str, Any] = {
        "stage": name,
        "command": f"amsdn {name} toy",
        "commit": "abc",
        "date": "2026-11-22",
        "hardware": "CPU",
        "seed": 0,
        "seconds": 2.0 * rows,
        "steps": 5 * rows,
        "images": 50 * rows,
        "data": {"name": "digits", "samples": 100},
        "clean_accuracy_val": None if name == "pretrain" else {"correct": 9, "samples": 10},
    }
    (folder / "run.json").write_text(json.dumps(info))
    history = []
    for i in range(rows):
        row = {"step": 5 * i, "images": 50 * i, "seconds": 2.0 * i, "loss": 1 + 1 / (i + 1), "accuracy": i / rows}
        history.append(row | ({"accuracy_attacked": i / rows / 2} if 4 * i > rows else {}))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    return folder


def test_committed_curves_are_drawn_from_their_evidence(committed: ModuleType) -> None:
    if not committed.FOLDER.exists():
        pytest.skip("no curves are committed")
    assert committed.main(["check"]) == 0


def test_thinning_keeps_ends_means_and_gaps(script: ModuleType) -> None:
    rows = [{"step": i, "seconds": 0.5 * i, "loss": float(i)} | ({"late": 1.0} if i > 6 else {}) for i in range(1, 11)]
    columns = script.thin(rows, 5)
    assert columns == {
        "step": [2, 4, 6, 8, 10],
        "seconds": [1, 2, 3, 4, 5],
        "loss": [1.5, 3.5, 5.5, 7.5, 9.5],
        "late": [None, None, None, 1, 1],
    }
    assert script.thin(rows, 200)["loss"] == [float(i) for i in range(1, 11)]
    uneven = script.thin(rows, 3)
    assert len(uneven["loss"]) == 3
    assert uneven["step"][-1] == 10


def test_what_was_added_is_drawn_and_checked(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(stage_folder(tmp_path / name, name, rows)) for name, rows in (("pretrain", 30), ("train", 500))]
    assert script.main(["add", *folders, "toy"]) == 0
    assert script.main(["check"]) == 0
    found = json.loads((script.FOLDER / "toy.json").read_text())
    assert [len(stage["points"]["loss"]) for stage in found["stages"]] == [30, 200]
    assert found["stages"][1]["points"]["accuracy_attacked"][:2] == [None, None]
    assert "NaN" not in (script.FOLDER / "toy.json").read_text()
    page, drawing = (script.FOLDER / "README.md").read_text(), (script.FOLDER / "toy.svg").read_text()
    assert "| train | 100 | 25,000 | 2,500 | 16.7 | 90.0 of 10 |" in page
    assert "amsdn pretrain toy" in page
    assert "minutes of training" in drawing
    assert "<dc:date>" not in drawing
    assert script.draw("toy", found) == drawing
    for path, text in ((script.FOLDER / "README.md", page), (script.FOLDER / "toy.svg", drawing)):
        path.write_text(text.replace("pretrain", "pretrained"))
        assert script.main(["check"]) == 1
        assert path.name in capsys.readouterr().out
        path.write_text(text)
    assert script.main(["check"]) == 0


def test_a_drawing_by_another_matplotlib_need_only_be_of_the_same_numbers(script: ModuleType, tmp_path: Path) -> None:
    script.main(["add", str(stage_folder(tmp_path / "train", "train", 20)), "toy"])
    path = script.FOLDER / "toy.svg"
    other = path.read_text().replace("Matplotlib v", "Matplotlib v9").replace("</svg>", "<!-- other paths --></svg>")
    path.write_text(other)
    assert script.main(["check"]) == 0
    found = json.loads((script.FOLDER / "toy.json").read_text())
    found["stages"][0]["points"]["loss"][3] += 0.1
    (script.FOLDER / "toy.json").write_text(json.dumps(found))
    assert script.main(["check"]) == 1


def test_the_page_tells_what_kills_did(script: ModuleType, tmp_path: Path) -> None:
    script.FOLDER.mkdir()
    stages = {name: {"weights": True, "curve": True, "record": True, "clean": True} for name in ("pretrain", "train", "finetune")}
    found = {"kills": 3, "by_phase_met": {"save": 1, "step": 2}, "fresh_interpreters": 1, "equal": stages, "seconds": 120.0}
    found |= {"command": "python scripts/chaos.py", "commit": "abc", "date": "today", "hardware": "CPU", "seed": 0}
    for right, told in (
        (True, "| weights, bit for bit | same | same | same |"),
        (False, "| weights, bit for bit | same | **differs** | same |"),
    ):
        stages["train"]["weights"] = right
        (script.FOLDER / "chaos.json").write_text(json.dumps(found))
        assert script.main(["write"]) == 0
        page = (script.FOLDER / "README.md").read_text()
        assert told in page
        assert "| no file left half-written | yes | yes | yes |" in page
        assert "killed by SIGKILL 3 times (1 at save, 2 at step; 1 of" in page
    assert script.main(["check"]) == 0
