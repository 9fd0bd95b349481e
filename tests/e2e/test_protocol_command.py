"""``amsdn evaluate --protocol``: fixed attacks and their checks, in one piece, in shards, or killed on the way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from amsdn.evaluation import protocol
from amsdn.evaluation.evaluate import RECORDS
from amsdn.evaluation.reliability import diagnosis

from .conftest import Outcome, Shell

TINY = {
    "curve_steps": 3,
    "ball_steps": 3,
    "square_queries": 5,
    "patch": {"num_steps": 3, "num_queries": 5, "restarts": 1, "margin_restarts": 1},
    "sparse": {"num_steps": 3, "num_queries": 5, "guided_queries": 5},
    "evading_steps": 3,
    "targets": 1,
}
FILES = (RECORDS, "reliability.json", "reliability/patch/eval.jsonl", "examples/patch-pgd-5.npz")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick protocol with next to no effort: what it finds is nobody's business here."""
    monkeypatch.setitem(protocol.EFFORTS, "quick", replace(protocol.EFFORTS["quick"], checked=4, **TINY))
    monkeypatch.setattr(diagnosis, "PATH_IMAGES", 4)
    monkeypatch.setattr(diagnosis, "BINARIZED_IMAGES", 2)
    for name in ("patch_diagnosis", "sparse_diagnosis", "linf_diagnosis", "l2_diagnosis"):
        make = getattr(protocol, name)
        monkeypatch.setattr(protocol, name, lambda *args, make=make: make(*args, steps=3))


def evaluated(amsdn: Shell, model: Path, arrays: Path, out: Path, *words: object) -> Outcome:
    outcome = amsdn("evaluate", "--protocol", "quick", "--data", f"arrays:{arrays}", "--model", model, "--out", out, *words)
    assert outcome.code == 0, outcome
    return outcome


def test_a_protocol_says_what_it_will_cost_and_what_can_be_believed(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = evaluated(amsdn, model_folder, arrays, out)
    assert "protocol quick, version 1: " in said.out
    assert "12 test images" in said.out
    assert "if every image resists everything" in said.out
    told = json.loads((out / "run.json").read_text())
    assert told["stages"]["evaluate"]["protocol"] == {"name": "quick", "version": 1}
    assert told["headline"] == dict(protocol.CIFAR.headline)
    checks = json.loads((out / "reliability.json").read_text())["threats"]
    assert checks.keys() == {"model", "patch", "sparse", "linf", "l2"}
    doubtful = [name for name, found in checks.items() if found["reliable"] != "yes"]
    assert ("~ not reliable:" in said.out) == bool(doubtful)
    reported = amsdn("report", out)
    assert reported.code == 0, reported
    page = (out / "report.html").read_text()
    assert "Can these numbers be believed?" in page
    assert ('<s class="value"' in page) == bool(doubtful)


def test_shards_killed_and_resumed_make_the_files_of_an_undisturbed_run(
    amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, shards, killed = (tmp_path / name for name in ("whole", "shards", "killed"))
    monkeypatch.setattr(protocol.Protocol, "config", replace(protocol.Protocol("quick", 16).config, batch_size=5))
    evaluated(amsdn, model_folder, arrays, whole)
    for shard in ("2/2", "1/2"):
        evaluated(amsdn, model_folder, arrays, shards, "--shard", shard)
        assert not (shards / "reliability.json").exists()
    evaluated(amsdn, model_folder, arrays, shards)
    shutil.copytree(whole, killed)
    (killed / "reliability.json").unlink()
    shutil.rmtree(killed / "reliability" / "l2")
    for name in (RECORDS, "reliability/patch/eval.jsonl"):
        rows = (killed / name).read_bytes()
        (killed / name).write_bytes(rows[: 2 * len(rows) // 3])
    evaluated(amsdn, model_folder, arrays, killed)
    for name in FILES:
        assert (whole / name).read_bytes() == (shards / name).read_bytes() == (killed / name).read_bytes(), name


@pytest.mark.parametrize(
    "words", [["--attacks", "pgd-4"], ["--samples", "3"], ["--evaluate.seed", "4"], ["--evaluate.batch-size", "9"]], ids=lambda w: w[0]
)
def test_what_a_protocol_fixes_cannot_be_chosen_besides(
    words: list[str], amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path
) -> None:
    common = ["--protocol", "quick", "--data", f"arrays:{arrays}", "--model", model_folder, "--out", tmp_path / "out"]
    outcome = amsdn("evaluate", *common, *words)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert f"--protocol quick fixes what {words[0].split('.')[0]} says" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "says"), [("return x.mean(), x", "tuple"), ("return x.mean((1, 2, 3))", "[1]"), ("return x @ x[0, 0, :3]", "fails")]
)
def test_a_model_that_cannot_be_evaluated_is_refused_before_its_cost_is_reckoned(
    body: str, says: str, amsdn: Shell, arrays: Path, tmp_path: Path
) -> None:
    source = f"from torch import nn\n\nclass Odd(nn.Module):\n    def forward(self, x):\n        {body}\n"
    module = f"odd_model_{says.strip('[]')}"  # a name of its own: this process remembers modules
    (tmp_path / f"{module}.py").write_text(source)
    outcome = amsdn("evaluate", "--protocol", "quick", "--data", f"arrays:{arrays}", "--model", f"{module}:Odd", "--out", tmp_path / "out")
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert says in outcome.err
    assert not (tmp_path / "out").exists()
