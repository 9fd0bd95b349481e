"""The weights that come with the package: whole, small, described, and known by name wherever a model folder is."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from amsdn.errors import InputError
from amsdn.models import shipped
from amsdn.models.shipped import PREFERRED, locate, shipped_models
from amsdn.models.storage import load_model

REPOSITORY = Path(__file__).parents[2]


def test_the_weights_of_the_source_tree_are_found() -> None:
    assert shipped_models() == {p.parent.name: p.parent for p in sorted((REPOSITORY / "weights").glob("*/config.json"))}
    assert PREFERRED in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_is_whole_and_described(name: str) -> None:
    model, folder = load_model(name), shipped_models()[name]
    about = json.loads((folder / "about.json").read_text())
    assert len(about["classes"]) == model.config.num_classes
    with torch.no_grad():
        assert model(torch.rand(1, 3, about["image_size"], about["image_size"])).isfinite().all()
    assert (folder / "README.md").read_text().startswith(f"# {name}\n")
    assert (folder / "model.safetensors").stat().st_size <= 20e6
    assert not model.training


def test_an_installed_package_carries_them_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "amsdn"
    shutil.copytree(shipped_models()[PREFERRED], package / "weights" / PREFERRED)
    shutil.copytree(shipped_models()[PREFERRED], package.parent / "weights" / "of another package")
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    assert shipped_models() == {PREFERRED: package / "weights" / PREFERRED}
    assert locate(PREFERRED) == package / "weights" / PREFERRED
    shutil.rmtree(package / "weights")
    assert shipped_models() == {}
    with pytest.raises(InputError, match="there are none in this installation"):
        load_model(PREFERRED)


def test_a_folder_that_is_there_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(PREFERRED) == shipped_models()[PREFERRED]
    Path(PREFERRED).mkdir()
    assert locate(PREFERRED) == Path(PREFERRED)
    assert locate("no such model") == Path("no such model")


def test_an_unknown_name_is_one_line_that_names_the_shipped_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"nonsense: no such folder; .*{PREFERRED}") as caught:
        load_model("nonsense")
    assert "\n" not in str(caught.value)
