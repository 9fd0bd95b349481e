"""``amsdn compare`` as it is typed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from amsdn.cli import main
from amsdn.records import EvalRecord


def write_run(folder: Path, wrong: set[int], data: str = "toy", first: int = 0) -> Path:
    """Twelve images, all right without an attack, those of ``wrong`` not under the one attack."""
    rows = [
        EvalRecord(i, attack, 0, attack, family, 5.0, 5.0, 0, int(bad), not bad, 0.0, 1, 1, None, None, None)
        for attack, family in (("clean", "clean"), ("patch-pgd", "patch"))
        for i in range(first, first + 12)
        for bad in [attack != "clean" and i in wrong]
    ]
    folder.mkdir()
    (folder / "eval.jsonl").write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"data": {"name": data, "split": "test"}, "model": {"name": folder.name}}))
    (folder / "eval_config.json").write_text(json.dumps({"data": "f", "model": folder.name}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "strong", {0}), write_run(tmp_path / "weak", set(range(11)))


def test_the_table_the_sentence_and_the_numbers(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "numbers.json"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "Patch 5×5" in line)
    assert line.split()[2:7] == ["12", "91.7", "8.3", "10", "0"]
    assert line.endswith("A")
    assert "12 images have all rows in both runs" in said
    assert "the worst case: A better" in " ".join(said.split())
    assert said.endswith(f"numbers: {out}\n")
    found = json.loads(out.read_text())
    row = next(row for row in found["rows"] if row["key"] == "threat:patch:5")
    assert (row["both"], row["only_a"], row["only_b"], row["neither"], row["verdict"]) == (1, 10, 0, 1, "A")
    assert found["a"]["folder"] == str(runs[0])
    assert found["sentence"] in " ".join(said.split())
    assert list(out.parent.iterdir()) == [out]


def test_the_level_of_the_intervals_can_be_chosen(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs), "--confidence", "0.8"]) == 0
    assert "paired 80 % interval" in capsys.readouterr().out


def refused(words: list[object], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("amsdn compare: ")
    assert says in captured.err


def test_bad_words(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs
    refused([], "name two run folders, got 0", capsys)
    refused([a], "name two run folders, got 1", capsys)
    refused([a, b, a], "name two run folders, got 3", capsys)
    refused([a, a], "is the same folder", capsys)
    refused([a, tmp_path / "nowhere"], "nowhere: no such run folder", capsys)
    refused([a, a / "eval.jsonl"], "no such run folder", capsys)
    for confidence in ("0", "1", "95", "nan", "often"):
        refused([a, b, "--confidence", confidence], "onfidence", capsys)
    refused([a, b, "--out", a], "is a folder; name a file", capsys)


@pytest.mark.parametrize("damage", ["other data", "broken rows", "no common images", "unwritable"])
def test_bad_runs_leave_nothing_behind(damage: str, runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs
    out = tmp_path / "numbers.json"
    if damage in ("other data", "no common images"):
        shutil.rmtree(b)
        write_run(b, set(), data="others" if damage == "other data" else "toy", first=100 if damage == "no common images" else 0)
    elif damage == "broken rows":
        (b / "eval.jsonl").write_text('{"sample_id": 0}\n')
    else:
        out = a / "eval.jsonl" / "numbers.json"
    says = {
        "other data": "of other data",
        "broken rows": "eval.jsonl:1",
        "no common images": "no image has all rows",
        "unwritable": "eval.jsonl",
    }
    refused([a, b, "--out", out], says[damage], capsys)
    assert not out.exists()


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    assert "amsdn compare runs/demo/AMSDN runs/demo/control" in capsys.readouterr().out
