"""What ``--model`` may name: each form goes through the commands, and what is none of them is refused in one line."""

import json
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from amsdn.attacks import ATTACKS, PGDAttack, SquareAttack
from amsdn.cli import main
from amsdn.commands import evaluate
from amsdn.commands.common import check_classes, describe_model, open_model
from amsdn.commands.measuring import fitting
from amsdn.commands.model_sources import TimmSpec
from amsdn.data import load_dataset
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.models.storage import save_model
from amsdn.models.timm_model import TimmModel
from amsdn.recipes import get_recipe

CPU = torch.device("cpu")
FACTORIES = """
import torchvision

def resnet():
    return torchvision.models.resnet18(weights=None, num_classes=10)
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("timm") / "net.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=10, pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes, images of 32 px, in batches of three; sure enough of the first test image's class for certificates."""
    for package in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install 'amsdn[dev]'")
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10)).eval()
    label = int(load_dataset("digits").test.fetch(torch.tensor([0]))[1])
    nn.init.constant_(net[3].bias[label : label + 1], 2.0)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, which come and go with its versions
        torch.onnx.export(net, (torch.rand(3, 3, 32, 32),), path, dynamo=True, verbose=False, external_data=False)
    return path


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]


def refused(capfd: pytest.CaptureFixture[str], says: str, *words: object) -> None:
    """Exit code 2, one line, nothing written."""
    assert main([*map(str, words), "--out", "out"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines[0]
    assert not Path("out").exists()


def test_a_torchvision_network_is_evaluated_as_it_is() -> None:
    Path("strangers.py").write_text(FACTORIES)
    words = ["--data", "digits", "--image-size", "32", "--samples", "4", "--attacks", "pgd-4"]
    assert main(["evaluate", "--model", "strangers:resnet", *words, "--out", "out"]) == 0
    assert [r["attack"] for r in rows(Path("out"))] == ["clean"] * 4 + ["pgd-4"] * 4
    assert json.loads(Path("out/run.json").read_text())["model"]["config"] == {"class": "ResNet"}


def test_a_network_of_timms_is_evaluated(timm_file: Path) -> None:
    name = f"timm:resnet10t@{timm_file}:mean=0.5,0.5,0.5"
    assert main(["evaluate", "--model", name, "--data", "digits", "--samples", "2", "--attacks", "pgd-4", "--out", "out"]) == 0
    config = json.loads(Path("out/run.json").read_text())["model"]["config"]
    assert config["class"] == "TimmConfig"
    assert (config["name"], config["num_classes"]) == ("resnet10t", 10)
    assert list(config["mean"]) == [0.5, 0.5, 0.5]


def test_an_onnx_file_meets_a_search_for_every_threat_of_the_recipe(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "fitting", partial(fitting, num_queries=20))
    assert main(["evaluate", "--model", str(onnx_file), "--data", "digits", "--samples", "1", "--out", "out"]) == 0
    found = rows(Path("out"))
    attacks = get_recipe("digits-demo").attacks
    assert {(r["family"], r["budget"]) for r in found} == {("clean", 0.0)} | {(a.threat.family, a.threat.budget) for a in attacks.values()}
    assert all(r["backwards"] == 0 for r in found)
    assert all(r["attack"] == "clean" or str(r["attack"]).startswith("search-") for r in found)


def test_an_onnx_file_is_searched_and_refuses_gradients_before_anything_is_written(
    onnx_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", onnx_file, "--data", "digits", "--samples", "3"]
    refused(capfd, "attack pgd: follows gradients, and this model only answers", "attack", "pgd", *words)
    refused(capfd, "attack pgd-4: follows gradients", "evaluate", "--attacks", "pgd-4", *words)
    refused(capfd, "learning a patch: follows gradients", "patch", *words)
    assert main(["attack", "square", "--num-queries", "20", *map(str, words), "--out", "out"]) == 0
    assert len(rows(Path("out/square"))) == 6


def test_an_onnx_file_is_certified_and_what_was_certified_is_attacked(onnx_file: Path) -> None:
    words = ["--data", "digits", "--samples", "2", "--out", "out", "--patch.size", "4", "--patch.masks-per-axis", "3"]
    quick = ["--smoothing.n", "200", "--recheck.n", "50", "--attacks.queries", "10", "--attacks.pixels", "1"]
    assert main(["certify", "--model", str(onnx_file), *words, *quick]) == 0
    checked = json.loads(Path("out/crosscheck.json").read_text())["certificates"]
    assert all(checked[kind]["checks"] > 0 for kind in ("l2", "patch", "l0"))
    assert {row["attack"] for row in checked["l2"]["rows"]} == {"search-l2-0.25"}
    attacked = {r["attack"] for path in Path("out").rglob("eval.jsonl") for r in rows(path.parent)}
    assert attacked == {"clean", "search-patch-4", "search-sparse-1"}


def test_what_a_model_does_not_fit_is_left_out(onnx_file: Path) -> None:
    attacks = {"pgd": PGDAttack(), "square": SquareAttack(), "fgsm": ATTACKS["fgsm"]()}
    assert fitting(attacks, nn.Identity()) == attacks
    black = open_model(str(onnx_file), CPU)
    assert list(fitting(attacks, black)) == ["square", "search-linf-8-255"]  # pgd and fgsm are of one threat
    assert fitting(attacks, black, 7)["search-linf-8-255"] == SquareAttack(8 / 255, 7)
    assert describe_model(black, "x")["config"] == {"class": "OnnxModel"}


def test_the_number_of_classes_must_be_the_datas(timm_file: Path, onnx_file: Path) -> None:
    two = load_dataset("digits")
    two = type(two)(two.name, two.train, two.val, two.test, ("a", "b"), two.image_size)
    for model in (open_model(f"timm:resnet10t@{timm_file}", CPU), open_model(str(onnx_file), CPU)):
        check_classes(model, load_dataset("digits"), "here")
        with pytest.raises(InputError, match="here: tells 10 classes apart, but digits has 2"):
            check_classes(model, two, "here")
    check_classes(nn.Identity(), two, "a stranger says nothing about it")


def test_what_exists_comes_first() -> None:
    save_model(AMSDN(num_classes=2, variant="compact", width=2, fpn_channels=8), "timm:resnet18")
    assert isinstance(open_model("timm:resnet18", CPU), AMSDN)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("timm:resnet18", TimmSpec("resnet18")),
        ("timm:resnet18.a1_in1k", TimmSpec("resnet18.a1_in1k")),
        ("timm:a@b/c.safetensors", TimmSpec("a", Path("b/c.safetensors"))),
        ("timm:a@b:c@d.safetensors", TimmSpec("a", Path("b:c@d.safetensors"))),
        ("timm:a:std=1,.5,0.25", TimmSpec("a", None, None, (1.0, 0.5, 0.25))),
        ("timm:a@x/y=z/c.safetensors:mean=0,0,0:std=1,1,1", TimmSpec("a", Path("x/y=z/c.safetensors"), (0.0,) * 3, (1.0,) * 3)),
    ],
)
def test_what_is_written_after_timm(text: str, spec: TimmSpec) -> None:
    assert TimmSpec.parse(text) == spec


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("timm:", "names no network"),
        ("timm:@a.safetensors", "names no network"),
        ("timm:resnet18@", "names no file"),
        ("timm:resnet18@a.pth", r"a\.pth: may be a pickle"),
        ("timm:resnet18:size=32", "unknown setting 'size'"),
        ("timm:resnet18@a:b=c.safetensors", "unknown setting 'b'"),
        ("timm:resnet18:mean=0.1,0.2", "mean must be three numbers"),
        ("timm:resnet18:mean=0.1,0.2,nan", "mean must be three numbers"),
        ("timm:resnet18:std=58,57,57", r"std must be three numbers in \[0,1\]"),
        ("none.onnx", r"none\.onnx: cannot be read"),
        ("net.pth", r"net\.pth: may be a pickle, which is never opened; convert it to safetensors"),
        ("net.safetensors", r"give timm:NAME@net\.safetensors"),
        ("README", "README: cannot be used; it may be a model folder"),
        ("nothing", "nothing: no such folder"),
        ("nothing:here", "cannot call it"),
    ],
)
def test_what_is_no_model(model: str, says: str) -> None:
    for name in ("net.pth", "net.safetensors", "README"):
        Path(name).write_bytes(b"x")
    with pytest.raises(InputError, match=says) as caught:
        open_model(model, CPU)
    assert "\n" not in str(caught.value)


def test_timm_networks_are_opened_in_eval_mode(timm_file: Path) -> None:
    model = open_model(f"timm:resnet10t@{timm_file}", CPU)
    assert isinstance(model, TimmModel)
    assert not any(m.training for m in model.modules())
