"""An entry without its evidence fails the check, whatever is missing."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from amsdn.evaluation.protocol import EFFORTS, VERSION, Protocol
from amsdn.records import EvalRecord, canonical
from tests.test_results import load

Entry = dict[str, Any]
SCRIPT = load("leaderboard")


def entry() -> Entry:
    """A whole entry, with numbers that nobody measured."""
    protocol = Protocol("standard", 32)
    cell = {"value": 0.5, "low": 0.45, "high": 0.55, "n": EFFORTS["standard"].samples}
    keys = ["clean", *(f"worst:{family}" for family in SCRIPT.FAMILIES), "union"]
    return {
        "name": "toy",
        "protocol": {"name": "standard", "version": VERSION, "side": 32},
        "samples": EFFORTS["standard"].samples,
        "command": ["amsdn evaluate --protocol standard"],
        "commit": "c0ffee",
        "date": "2026-01-01",
        "versions": {"torch": "2"},
        "hardware": "a machine",
        "seed": 0,
        "seconds": {"evaluate": 1.0},
        "model": {"name": "toy"},
        "data": {"name": "cifar10"},
        "attacks": {name: json.loads(json.dumps(canonical(a))) for name, a in protocol.attacks(nn.Identity()).items()},
        "reliable": dict.fromkeys(("model", *SCRIPT.FAMILIES), "yes"),
        "rows_sha256": "0" * 64,
        "rows": [{"key": key, "label": key, "cell": dict(cell), "doubts": []} for key in keys],
    }


def test_the_board_has_its_evidence() -> None:
    assert SCRIPT.main(["check"]) == 0


def test_a_whole_entry_lacks_nothing() -> None:
    assert SCRIPT.lacks(entry()) == []


def change(path: str, value: object) -> Callable[[Entry], None]:
    def apply(found: Entry) -> None:
        *inner, last = path.split(".")
        for key in inner:
            found = found[int(key) if key.isdecimal() else key]
        if value is None:
            del found[last]
        else:
            found[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change("samples", 999), "1000 images (has 999)"),
        (change("commit", "c0ffee+changes"), "a commit without changes"),
        (change("command", []), "command"),
        (change("reliable.patch", None), "checks of patch"),
        (change("reliable.model", None), "checks of model"),
        (change("attacks.patch-pgd-5", None), "the protocol's patch-pgd-5"),
        (change("attacks.patch-pgd-5.num_steps", 3), "the protocol's patch-pgd-5"),
        (change("rows.0.cell.low", 0.6), "count and interval of clean"),
        (change("rows.1.key", "worst:other"), "a row for patch"),
        (change("protocol.name", "mine"), "protocol mine is unknown"),
    ],
)
def test_whatever_is_missing_is_named(damage: Callable[[Entry], None], said: str) -> None:
    found = entry()
    damage(found)
    assert any(said in missing for missing in SCRIPT.lacks(found)), SCRIPT.lacks(found)


def test_the_page_ranks_by_the_worst_case_and_strikes_out_what_cannot_be_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCRIPT, "BOARD", tmp_path)
    better, worse = entry(), entry()
    better["name"] = "better"
    better["rows"][-1]["cell"] = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 1000}
    better["rows"][1]["doubts"] = ["random noise does as well"]
    for stem, found in (("a", worse), ("b", better)):
        (tmp_path / f"{stem}.json").write_text(json.dumps(found))
    assert SCRIPT.main(["check"]) == 1  # there is no page yet
    assert SCRIPT.main(["write"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert page.index("[better](b.json)") < page.index("[toy](a.json)")
    assert page.count("~~50.0 [45.0, 55.0]~~") == 1
    assert SCRIPT.main(["check"]) == 0
    (tmp_path / "a.json").write_text(json.dumps({**worse, "samples": 10}))
    assert SCRIPT.main(["check"]) == 1


def test_a_run_without_a_protocol_is_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(SCRIPT, "BOARD", tmp_path / "board")
    row = EvalRecord(0, "clean", 0, "clean", "clean", 0.0, 0.0, 0, 0, True, 1.0, 1, 0, None, None, None)
    (tmp_path / "eval.jsonl").write_text(json.dumps(asdict(row)) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"data": {"name": "toy", "split": "test", "classes": ["a", "b"]}}))
    assert SCRIPT.main(["add", str(tmp_path), "toy"]) == 2
    assert "was not made by a protocol" in capsys.readouterr().err
    assert not (tmp_path / "board").exists()
