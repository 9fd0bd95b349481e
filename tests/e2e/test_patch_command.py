"""``amsdn patch``: what it leaves behind, what it counts, and how it refuses."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from amsdn.attacks import ApplyPatch, UniversalPatch
from amsdn.commands.common import find_class, open_model
from amsdn.commands.options import parse
from amsdn.commands.patch import EXAMPLE, PatchOptions, rate, wilson_of_mean
from amsdn.data import load_dataset
from amsdn.errors import InputError
from amsdn.evaluation.statistics import wilson

from .conftest import Shell

SMALL = ["--num-steps", "3", "--batch-size", "8", "--draws", "2", "--size", "5"]


def test_a_patch_is_learned_judged_and_written(amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "patch", f"arrays:{arrays}"
    options = ["--model", model_folder, "--data", data, "--out", out, "--target", "bright", "--physical", "True", *SMALL]
    outcome = amsdn("patch", *options)
    assert outcome.code == 0, outcome
    assert sorted(p.name for p in out.iterdir()) == ["example.png", "patch.json", "patch.pdf", "patch.png"]
    for words in ("5 px patch", "target bright", "held-out transformations", "random colours instead", "worst of 2 draws", "(10 cm)"):
        assert words in outcome.out, outcome.out

    patch = UniversalPatch.load(out / "patch.png")
    assert patch.content.shape == (3, 5, 5)
    told = json.loads((out / "patch.json").read_text())
    assert told["attack"]["target_class"] == 1
    assert told["target"] == {"index": 1, "name": "bright"}
    assert told["attack"]["transformations"]["noise"] > 0
    assert [r["name"] for r in told["results"]] == ["transformations as trained", "held-out transformations", "random colours instead"]
    assert told["results"][0]["transformations"] != told["results"][1]["transformations"]
    assert {"commit", "command", "versions", "seed", "train_samples", "model", "data"} <= set(told)

    model, test = open_model(str(model_folder), torch.device("cpu")), load_dataset(data).test
    x, y = test.fetch(torch.arange(12))
    right = model(x).argmax(1) == y
    for row in told["results"]:
        assert row["untargeted"]["images"] == row["untargeted"]["worst_of_draws"]["n"] == int(right.sum())
        assert row["targeted"]["images"] == int((right & (y != 1)).sum())
    assert ApplyPatch(out / "patch.png", 5).threat.contains(ApplyPatch(out / "patch.png", 5)(model, x, y).x_adv, x).all()

    before = {p.name: p.read_bytes() for p in out.glob("patch.p*")}
    amsdn("patch", *options)
    assert {p.name: p.read_bytes() for p in out.glob("patch.p*")} == before  # the same seed, the same patch
    with Image.open(out / "example.png") as sheet:
        assert sheet.width > 7 * 100
        assert sheet.height > 8 * 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "purple"], ["--target purple", "dark, bright"]),
        (["--target", "2"], ["--target 2"]),
        (["--target", "²"], ["--target ²", "dark, bright"]),
        (["--size", "17"], ["--size 17", "16 px"]),
        (["--size", "0"], ["--size must be at least 1"]),
        (["--draws", "0"], ["--draws must be at least 1"]),
        (["--print-size-cm", "0"], ["printed size"]),
        (["--print-size-cm", "ten"], ["ten"]),
        (["--out", "file/patch"], ["file/patch"]),
    ],
)
def test_bad_options_are_one_line(options: list[str], words: list[str], amsdn: Shell, model_folder: Path, arrays: Path) -> None:
    Path("file").write_text("")
    outcome = amsdn("patch", "--model", model_folder, "--data", f"arrays:{arrays}", *SMALL, *options)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.err.startswith("amsdn patch: ")
    for word in words:
        assert word in outcome.err
    assert not list(Path().rglob("*.png"))


def test_several_processes_would_write_one_patch_and_are_refused(
    amsdn: Shell, model_folder: Path, arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    outcome = amsdn("patch", "--model", model_folder, "--data", f"arrays:{arrays}", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.err == "amsdn patch: works in one process and was started in 2; start it without torchrun\n"
    assert not (tmp_path / "out").exists()


def test_the_example_is_a_command_that_parses(amsdn: Shell) -> None:
    program, command, *words = shlex.split(EXAMPLE)
    assert (program, command) == ("amsdn", "patch")
    options = parse(PatchOptions(), words, command, "")
    assert options.physical
    assert find_class(options.target, [f"digit {i}" for i in range(10)]) == 3
    told = amsdn("patch", "--help")
    assert "--physical True" in " ".join(told.out.replace("│", " ").split())


def test_classes_by_name_before_index() -> None:
    assert find_class("cat", ["dog", "cat"]) == 1
    assert find_class("1", ["1", "0"]) == 0
    assert find_class("1", ["dog", "cat"]) == 1
    with pytest.raises(InputError, match="no such class"):
        find_class("-1", ["dog"])


def test_rates() -> None:
    found = rate(torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert (found["images"], found["mean"]) == (4, 0.625)
    assert found["worst_of_draws"]["successes"] == 3
    assert (found["low"], found["high"]) == wilson_of_mean(0.625, 4)
    assert rate(torch.tensor([]))["mean"] is None


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 10), (10, 10), (451, 500)])
def test_interval_of_a_mean_is_wilsons_for_counts(successes: int, n: int) -> None:
    assert wilson_of_mean(successes / n, n) == pytest.approx(wilson(successes, n), abs=1e-9)
