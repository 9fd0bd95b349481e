"""Which model a command takes where none is named."""

from pathlib import Path

import pytest

from amsdn.commands.common import default_model
from amsdn.errors import InputError
from amsdn.models.shipped import PREFERRED


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(recipe: str, *stages: str, whole: bool = True) -> None:
    for stage in stages:
        folder = Path("checkpoints") / recipe / stage / "model"
        folder.mkdir(parents=True)
        if whole:
            (folder / "config.json").touch()


def test_the_last_stage_that_was_trained() -> None:
    trained("digits-demo", "pretrain", "train")
    assert default_model("digits-demo") == "checkpoints/digits-demo/train/model"
    trained("digits-demo", "finetune", whole=False)  # under way
    assert default_model("digits-demo", instead=PREFERRED) == "checkpoints/digits-demo/train/model"
    (Path("checkpoints/digits-demo/finetune/model") / "config.json").touch()
    assert default_model("digits-demo") == "checkpoints/digits-demo/finetune/model"


def test_a_trained_model_comes_before_the_shipped_one_of_the_recipe() -> None:
    assert default_model(PREFERRED) == PREFERRED
    trained(PREFERRED, "pretrain")  # which knows no classes
    assert default_model(PREFERRED) == PREFERRED
    trained(PREFERRED, "train")
    assert default_model(PREFERRED) == f"checkpoints/{PREFERRED}/train/model"


def test_where_there_is_neither_both_remedies_are_named() -> None:
    assert default_model("digits-demo", instead=PREFERRED) == PREFERRED
    with pytest.raises(InputError, match=f"run amsdn train digits-demo, or name one with --model: .*{PREFERRED}") as caught:
        default_model("digits-demo")
    assert "\n" not in str(caught.value)
