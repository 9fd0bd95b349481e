"""The whole story on the command line, tiny: what each command leaves behind, and that running it again changes nothing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from amsdn.evaluation.certification import read_certificates

from .conftest import Shell

SMALL = ["--loop.epochs", "1", "--loop.batch-size", "20", "--model.width", "2", "--model.fpn-channels", "8"]

CHEAPLY = [
    *("--smoothing.n0", "10", "--smoothing.n", "40", "--smoothing.block", "10"),
    *("--recheck.steps", "2", "--recheck.draws", "2", "--recheck.n", "20"),
    *("--patch.size", "4", "--patch.masks-per-axis", "2", "--pixels.rows", "2", "--pixels.columns", "2"),
    *("--attacks.samples", "2", "--attacks.steps", "1", "--attacks.queries", "2", "--attacks.pixels", "1"),
]


@pytest.fixture
def trained(amsdn: Shell, arrays: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    for stage in ("pretrain", "train", "finetune"):
        outcome = amsdn(stage, "--data", f"arrays:{arrays}", "--out", out, *SMALL)
        assert outcome.code == 0, outcome
        assert outcome.out.strip() == f"model: {out / stage / 'model'}"
    return out


def test_train_evaluate_certify_report_predict(amsdn: Shell, trained: Path, arrays: Path, tmp_path: Path) -> None:
    model, data, run = trained / "finetune" / "model", f"arrays:{arrays}", trained / "evaluation"
    names = ["patch-pgd-4", "sparse-pgd-5", "apgd-8"]
    evaluated = amsdn("evaluate", "--model", model, "--data", data, "--out", run, "--attacks", *names)
    assert evaluated.code == 0, evaluated
    assert "Clean accuracy" in evaluated.out
    certified = amsdn("certify", "--model", model, "--data", data, "--out", run, "--samples", "4", *CHEAPLY)
    assert certified.code == 0, certified
    for wanted in ("certified ℓ₂ ≤\u00a00.25", "certified patch", "or alarm", "changed pixel", "no violation"):
        assert wanted in certified.out, wanted
    rows = (run / "eval.jsonl").read_text(), (run / "cert.jsonl").read_text()
    assert len(rows[0].splitlines()) == 12 * (1 + len(names))
    assert len(rows[1].splitlines()) == 4 * 4  # l2, patch, patch-detection, l0
    assert set(json.loads((run / "crosscheck.json").read_text())["certificates"]) == {"l2", "patch", "patch-detection", "l0"}

    again = amsdn("evaluate", "--model", model, "--data", data, "--out", run, "--attacks", *names)
    assert again.code == 0, again
    amsdn("certify", "--model", model, "--data", data, "--out", run, "--samples", "4", *CHEAPLY)
    assert ((run / "eval.jsonl").read_text(), (run / "cert.jsonl").read_text()) == rows

    reported = amsdn("report", f"defended={run}", "--out", tmp_path / "page")
    assert reported.code == 0, reported
    info = json.loads((run / "run.json").read_text())
    assert info["model"]["false_positive_rate"] == pytest.approx(0.05)
    assert set(info["stages"]) == {"evaluate", "certify l2", "certify patch", "certify l0"}
    page = (tmp_path / "page" / "report.html").read_text()
    assert info["model"]["fingerprint"] in page
    assert json.loads((tmp_path / "page" / "report.json").read_text())["subject"] == "defended"

    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "picture.png")
    predicted = amsdn("predict", tmp_path / "picture.png", "--model", model, "--out", tmp_path / "heat")
    assert predicted.code == 0, predicted
    assert "dark" in predicted.out or "bright" in predicted.out
    assert len(list((tmp_path / "heat").iterdir())) == 1
    assert "double masking" not in predicted.out
    proved = amsdn("predict", tmp_path / "picture.png", "--model", model, "--out", tmp_path / "heat", "--patch", "4")
    assert proved.code == 0, proved
    assert "a 4x4 patch might change that" in proved.out or "no 4x4 patch can change that" in proved.out
    refused = amsdn("predict", tmp_path / "picture.png", "--model", model, "--out", tmp_path / "none", "--patch", "999")
    assert refused.code == 2, refused
    assert "999x999 patch does not fit" in refused.err
    assert not (tmp_path / "none").exists()


def test_shards_make_the_rows_of_the_whole(amsdn: Shell, trained: Path, arrays: Path, tmp_path: Path) -> None:
    common = ["certify", "--model", trained / "finetune" / "model", "--data", f"arrays:{arrays}", "--samples", "5", *CHEAPLY]
    for shard in ("2/2", "1/2"):
        outcome = amsdn(*common, "--out", tmp_path / "shards", "--shard", shard)
        assert outcome.code == 0, outcome
        assert f"shard {shard} is done" in outcome.out
        assert not (tmp_path / "shards" / "crosscheck.json").exists()
    whole = [amsdn(*common, "--out", tmp_path / folder) for folder in ("shards", "whole")]
    assert [outcome.code for outcome in whole] == [0, 0], whole
    assert not (tmp_path / "shards" / "cert.jsonl").exists()  # nothing was left to do
    rows, expected = (read_certificates(tmp_path / folder) for folder in ("shards", "whole"))
    assert [replace(r, seconds=0.0) for r in rows] == [replace(r, seconds=0.0) for r in expected]


def test_shards_of_an_evaluation_make_the_files_of_the_whole(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    words = ["--evaluate.batch-size", "5", "--attacks", "pgd-4"]
    common = ["evaluate", "--model", model_folder, "--data", f"arrays:{arrays}", *words]
    for shard in ("2/2", "1/2"):
        outcome = amsdn(*common, "--out", tmp_path / "shards", "--shard", shard)
        assert outcome.code == 0, outcome
        assert f"shard {shard} is done" in outcome.out
        assert not (tmp_path / "shards" / "run.json").exists()
    whole, undivided = (amsdn(*common, "--out", tmp_path / folder) for folder in ("shards", "whole"))
    assert whole.out.replace(str(tmp_path / "shards"), str(tmp_path / "whole")) == undivided.out
    for name in ("eval.jsonl", "eval_config.json", "examples/pgd-4.npz"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    told = json.loads((tmp_path / "shards" / "run.json").read_text())
    assert ["--shard 2/2" in told["shards"][shard]["command"][-1] for shard in ("1/2", "2/2")] == [False, True]
    again = amsdn(*common, "--out", tmp_path / "shards")
    assert again.out == whole.out
    refused = amsdn(*common, "--out", tmp_path / "shards", "--shard", "1/2", "--evaluate.seed", "1")
    assert refused.code == 2
    assert "another seed" in refused.err


def test_certifying_more_images_and_attacking_otherwise_goes_on_in_the_same_folder(
    amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    common = ["certify", "--certificates", "patch", "l0", "--model", model_folder, "--data", f"arrays:{arrays}", "--out", out, *CHEAPLY]
    folders: list[set[str]] = []
    for words in (["--samples", "1"], ["--samples", "3"], ["--samples", "4"], ["--samples", "4", "--attacks.steps", "2"]):
        outcome = amsdn(*common, *words)
        assert outcome.code == 0, outcome
        assert "no violation; attacked images inside certified radii: " in outcome.out
        assert len(read_certificates(out)) == 3 * int(words[1])
        kinds = json.loads((out / "crosscheck.json").read_text())["certificates"]
        folders.append({kind["folder"] for kind in kinds.values()})
        assert all((out / folder / "eval.jsonl").exists() for folder in folders[-1])
    one, three, four, otherwise = folders
    assert three == four  # the same two images attacked in the same way: nothing was done again
    assert not one & three
    assert not three & otherwise
    refused = amsdn(*common, "--samples", "4", "--patch.size", "3")
    assert refused.code == 2
    assert "another configuration" in refused.err


def test_a_violation_of_an_earlier_call_is_not_passed_over(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = json.dumps({"violations": 1, "certificates": {"patch": {"violations": 1, "checks": 2}}})
    out.mkdir()
    (out / "crosscheck.json").write_text(found)
    words = ["--certificates", "l0", "--samples", "2", "--data", f"arrays:{arrays}", "--out", out, *CHEAPLY]
    outcome = amsdn("certify", "--model", model_folder, *words)
    assert outcome.code == 0, outcome
    assert "VIOLATIONS OF AN EARLIER CALL (1 for patch)" in outcome.out


def test_a_run_folder_belongs_to_one_model_and_names_how_it_was_trained(amsdn: Shell, trained: Path, arrays: Path, tmp_path: Path) -> None:
    common = ["--data", f"arrays:{arrays}", "--out", tmp_path / "mix"]
    evaluated = amsdn("evaluate", *common, "--model", trained / "train" / "model", "--attacks", "patch-pgd-4")
    assert evaluated.code == 0, evaluated
    assert "Patch 4×4" in evaluated.out  # not the recipe's headline budget, but what was attacked
    commands = json.loads((tmp_path / "mix" / "run.json").read_text())["command"]
    assert [c.split()[1] for c in commands] == ["pretrain", "train", "evaluate"]
    refused = amsdn("certify", *common, "--model", trained / "finetune" / "model", "--samples", "2")
    assert refused.code == 2
    assert "another model" in refused.err
    assert not (tmp_path / "mix" / "cert.jsonl").exists()


def test_one_attack_states_its_budget_and_keeps_its_images(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    words = ["--epsilon", "8/255", "--num-steps", "3", "--samples", "5", "--out", tmp_path / "out"]
    outcome = amsdn("attack", "--model", model_folder, "--attack", "pgd", "--data", f"arrays:{arrays}", *words)
    assert outcome.code == 0, outcome
    assert "threat linf 8/255" in outcome.out
    assert "ℓ∞ 8/255" in outcome.out
    assert (tmp_path / "out" / "pgd" / "examples" / "pgd.npz").exists()


def test_an_attack_with_a_target_that_must_stay_unnoticed(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    words = ["--attack=pgd", "--epsilon", "1/2", "--target", "0", "--evade", "joint", "--num-steps", "3", "--samples", "6"]
    outcome = amsdn("attack", "--model", model_folder, "--data", f"arrays:{arrays}", "--out", tmp_path / "out", *words)
    assert outcome.code == 0, outcome
    rows = [json.loads(line) for line in (tmp_path / "out" / "pgd" / "eval.jsonl").read_text().splitlines()]
    attacked = [r for r in rows if r["attack"] == "pgd"]
    assert all(r["evades"] for r in attacked)
    assert all(r["success"] == (r["prediction"] == 0 and not r["detected"]) for r in attacked if r["label"] != 0)
    assert not any(r["success"] or r["backwards"] for r in attacked if r["label"] == 0)


def test_a_finished_stage_run_again_keeps_its_weights(amsdn: Shell, trained: Path, arrays: Path) -> None:
    weights = (trained / "train" / "model" / "model.safetensors").read_bytes()
    recorded = (trained / "train" / "run.json").read_bytes()
    outcome = amsdn("train", "--data", f"arrays:{arrays}", "--out", trained, *SMALL)
    assert outcome.code == 0, outcome
    assert (trained / "train" / "model" / "model.safetensors").read_bytes() == weights
    assert (trained / "train" / "run.json").read_bytes() == recorded


def test_other_settings_in_the_same_folder_are_refused(amsdn: Shell, trained: Path, arrays: Path) -> None:
    outcome = amsdn("train", "--data", f"arrays:{arrays}", "--out", trained, *SMALL, "--loop.learning-rate", "1/7")
    assert outcome.code == 2
    assert "made under other settings" in outcome.err


@pytest.mark.parametrize(
    "command", ["demo", "pretrain", "train", "finetune", "evaluate", "certify", "attack", "patch", "predict", "report"]
)
def test_every_command_explains_itself_with_an_example(command: str, amsdn: Shell) -> None:
    outcome = amsdn(command, "--help")
    assert outcome.code == 0
    assert "amsdn " + command in outcome.out
    assert "Example:" in outcome.out
    assert outcome.err == ""


def test_the_general_help_and_the_version(amsdn: Shell) -> None:
    assert "usage: amsdn" in amsdn("--help").out
    assert amsdn("--version").out.startswith("amsdn ")
    assert amsdn().code == 2


STAGES = [
    "training.pretrain_ssrt",
    "training.adversarial_train",
    "training.finetune_attacks",
    "evaluation.evaluate",
    "evaluation.certification",
]


@pytest.mark.slow
@pytest.mark.parametrize("module", STAGES)
def test_the_founding_modules_run_their_stage(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"amsdn.{module}", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Example: amsdn" in done.stdout
