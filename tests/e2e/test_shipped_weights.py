"""The shipped weights at work: nothing trained, nothing downloaded, no folder named."""

from pathlib import Path

import pytest
from PIL import Image

from amsdn.models.shipped import PREFERRED, shipped_models

from .conftest import Shell
from .test_bad_input import refused


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (20, 60, 200)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_photo_is_classified_right_after_installing(amsdn: Shell, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("amsdn.models.storage.fetch", no_network)
    outcome = amsdn("predict", photo)
    assert outcome.code == 0, outcome
    told, answer = outcome.out.splitlines()
    assert told == f"model: {PREFERRED}"
    named = amsdn("predict", photo, "--model", PREFERRED)
    assert named.code == 0, named
    assert named.out.splitlines() == [answer]
    assert answer.startswith(f"{photo}: ")


def test_help_names_the_shipped_models(amsdn: Shell) -> None:
    described = " ".join(amsdn("predict", "--help").out.replace("│", " ").split())
    for name in shipped_models():
        assert name in described


@pytest.mark.parametrize("command", [("evaluate", PREFERRED), ("certify", PREFERRED), ("attack", "pgd", "--model", PREFERRED)])
def test_the_shipped_model_of_a_recipe_is_the_one_meant(command: tuple[str, ...], amsdn: Shell, arrays: Path, tmp_path: Path) -> None:
    outcome = amsdn(*command, "--data", f"arrays:{arrays}", "--out", tmp_path / "out")
    refused(outcome, f"{PREFERRED}: tells 10 classes apart")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("evaluate",), ("certify", "cifar10-smoothing"), ("attack", "pgd")])
def test_without_any_model_both_remedies_are_named(command: tuple[str, ...], amsdn: Shell, tmp_path: Path) -> None:
    refused(amsdn(*command, "--device", "cpu"), "run amsdn train", "--model", PREFERRED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [("evaluate",), ("certify",), ("attack", "pgd"), ("patch",), ("predict", "PHOTO"), ("finetune", "--init", "")]
)
def test_an_unknown_name_lists_the_shipped_models(command: tuple[str, ...], amsdn: Shell, arrays: Path, photo: Path) -> None:
    words = [str(photo) if word == "PHOTO" else word for word in command if word]
    if command[0] == "finetune":
        outcome = amsdn(*words, "nonsense", "--data", f"arrays:{arrays}")
    else:
        outcome = amsdn(*words, "--model", "nonsense", *([] if command[0] == "predict" else ["--data", f"arrays:{arrays}"]))
    refused(outcome, "nonsense: no such folder", *shipped_models())
