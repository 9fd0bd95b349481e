"""Bad input: one clear line on stderr, exit code 2, nothing half-written."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import Outcome, Shell


def refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, exactly one line that starts with the command and names the culprit and a remedy."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]  # without the bars
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("amsdn")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0], f"{word!r} not in {lines[0]!r}"


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    Image.fromarray(array, mode).save(path)
    return path


def bad_image(kind: str, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    path = folder / "bad.png"
    if kind == "16-bit":
        return save(path, rng.integers(0, 60000, (16, 16), dtype=np.uint16))
    if kind == "1x1":
        return save(path, np.zeros((1, 1, 3), np.uint8))
    if kind in ("grey", "RGBA"):
        return save(path, rng.integers(0, 255, (16, 16) if kind == "grey" else (16, 16, 4), dtype=np.uint8))
    if kind == "missing":
        return path
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:200] if kind == "truncated" else b"this is no image at all")
    return path


@pytest.mark.parametrize("kind", ["16-bit", "1x1", "grey", "RGBA", "missing", "truncated", "text"])
def test_an_image_that_cannot_be_used_is_named_and_no_other_is_predicted(
    kind: str, amsdn: Shell, model_folder: Path, tmp_path: Path
) -> None:
    good = save(tmp_path / "good.png", np.zeros((16, 16, 3), np.uint8))
    outcome = amsdn("predict", good, bad_image(kind, tmp_path), "--model", model_folder, "--out", tmp_path / "heat")
    refused(outcome, "bad.png")
    assert not (tmp_path / "heat").exists()


@pytest.mark.parametrize("kind", ["palette", "large", "tall"])
def test_an_image_that_only_looks_odd_is_predicted(kind: str, amsdn: Shell, model_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 60, 3) if kind != "large" else (700, 500, 3), dtype=np.uint8))
    picture = picture.convert("P" if kind == "palette" else "RGB").rotate(90 if kind == "tall" else 0, expand=True)
    picture.save(tmp_path / "odd.png")
    outcome = amsdn("predict", tmp_path / "odd.png", "--model", model_folder, "--out", tmp_path / "heat")
    assert outcome.code == 0, outcome
    assert "anomaly score" in outcome.out
    assert len(list((tmp_path / "heat").glob("*.png"))) == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickle", "no config", "broken config", "foreign config", "only a pickle"])
def test_a_checkpoint_that_cannot_be_used(damage: str, amsdn: Shell, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    trap = pickle.dumps(Trap())
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "pickle":
        weights.write_bytes(trap)
    elif damage == "no config":
        config.unlink()
    elif damage == "broken config":
        config.write_text("{")
    elif damage == "foreign config":
        config.write_text(json.dumps({"hidden_size": 768}))
    else:
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(trap)
    picture = save(tmp_path / "good.png", np.zeros((16, 16, 3), np.uint8))
    refused(amsdn("predict", picture, "--model", folder, "--out", tmp_path / "heat"), str(folder))
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "heat").exists()


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("sprung", "w")


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("nothing", "nothing"),
        ("arrays:no/such/folder", "no/such/folder"),
        ("folder:no/such/folder", "no/such/folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate", "certify"])
def test_a_data_set_that_is_not_there(command: str, data: str, names: str, amsdn: Shell, model_folder: Path, tmp_path: Path) -> None:
    model = [] if command == "train" else ["--model", model_folder]
    refused(amsdn(command, "--data", data, "--out", tmp_path / "out", *model), names)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing labels", "NaN floats", "objects", "label out of range"])
def test_arrays_that_cannot_be_used(damage: str, amsdn: Shell, arrays: Path, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(arrays, folder)
    images, labels = folder / "test_images.npy", folder / "test_labels.npy"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-50])
    elif damage == "missing labels":
        labels.unlink()
    elif damage == "NaN floats":
        np.save(images, np.full((12, 16, 16, 3), np.nan, np.float32))
    elif damage == "objects":
        np.save(images, np.array([Trap()] * 12, dtype=object), allow_pickle=True)
    else:
        np.save(labels, np.full(12, 7, np.uint8))
    outcome = amsdn("evaluate", "--data", f"arrays:{folder}", "--model", model_folder, "--out", tmp_path / "out")
    refused(outcome, "test_labels.npy" if "label" in damage else "test_images.npy")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out").exists()


MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.linear, self.scale = nn.Linear(3 * 16 * 16, 2), scale
    def forward(self, x):
        return self.linear(x.flatten(1)) * self.scale

def good():
    torch.manual_seed(0)
    return Net()

def not_finite():
    return Net(float("nan"))

class Crashing(Net):
    def forward(self, x):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

class Coupled(Net):  # an image changes the answers to its neighbours
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
    def forward(self, x):
        return super().forward(self.norm(x))

class Noisy(Net):  # and does not say so
    stochastic = False
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))

class Honest(Noisy):
    stochastic = True

class OneClass(Net):
    def forward(self, x):
        return super().forward(x)[:, :1]

def coupled():
    return Coupled()

def noisy():
    return Noisy()

def honest():
    return Honest()

def one_class():
    return OneClass()

class Tuple(Net):
    def forward(self, x):
        return super().forward(x), x

def crashes():
    return Crashing()

def returns_a_tuple():
    return Tuple()

def stubborn():  # refuses eval mode
    net = good()
    net.train = lambda mode=True: net
    return net

def no_module():
    return 3

def fails():
    return undefined_name_here
"""


@pytest.fixture
def foreign(tmp_path: Path, amsdn: Shell) -> str:
    (tmp_path / "foreign_models.py").write_text(MODELS)
    return "foreign_models"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("not_finite", "not finite"),
        ("stubborn", "eval()"),
        ("no_module", "must return"),
        ("absent", "absent"),
        ("crashes", "cannot be multiplied"),
        ("returns_a_tuple", "tuple"),
        ("fails", "undefined_name_here"),
    ],
)
def test_a_foreign_classifier_that_cannot_be_used(
    function: str, says: str, amsdn: Shell, foreign: str, arrays: Path, tmp_path: Path
) -> None:
    refused(amsdn("evaluate", "--data", f"arrays:{arrays}", "--model", f"{foreign}:{function}", "--out", tmp_path / "out"), says)
    assert not list((tmp_path / "out").glob("eval.jsonl"))


@pytest.mark.parametrize("kind", ["l2", "patch", "l0"])
@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("not_finite", "not finite"),
        ("stubborn", "eval()"),
        ("crashes", "cannot be multiplied"),
        ("returns_a_tuple", "tuple"),
        ("coupled", "images beside it"),
        ("noisy", "from call to call"),
        ("one_class", "1 classes"),
    ],
)
def test_a_foreign_classifier_that_cannot_be_certified_leaves_nothing_behind(
    kind: str, function: str, says: str, amsdn: Shell, foreign: str, arrays: Path, tmp_path: Path
) -> None:
    fitting = ["--patch.size", "4", "--certificates", kind]
    words = ["--data", f"arrays:{arrays}", "--model", f"{foreign}:{function}", "--out", tmp_path / "out", *fitting]
    refused(amsdn("certify", *words), says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["patch", "l0"])
def test_only_noise_certifies_a_classifier_that_declares_randomness(
    kind: str, amsdn: Shell, foreign: str, arrays: Path, tmp_path: Path
) -> None:
    words = ["--data", f"arrays:{arrays}", "--model", f"{foreign}:honest", "--out", tmp_path / "out", "--patch.size", "4"]
    refused(amsdn("certify", *words, "--certificates", kind), "stochastic")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--patch.size", "17"], "a 17x17 patch does not fit images of 16x16"),
        (["--patch.size", "0"], "patch, masks_per_axis and views_per_pass must be at least 1"),
        (["--patch.masks-per-axis", "0"], "patch, masks_per_axis and views_per_pass must be at least 1"),
        (["--patch.coarser", "1"], "coarser must hold numbers from 2"),
        (["--patch.confidence", "2"], "confidence be a probability"),
        (["--pixels.rows", "0"], "rows, columns and views_per_pass must be at least 1"),
        (["--pixels.rows", "17"], "17x6 parts do not fit images of 16x16"),
        (["--attacks.steps", "0"], "num_steps must be at least 1"),
        (["--attacks.pixels", "0"], "must be positive"),
    ],
)
def test_a_certificate_that_does_not_fit_is_refused_before_the_others_are_made(
    words: list[str], says: str, amsdn: Shell, arrays: Path, model_folder: Path, tmp_path: Path
) -> None:
    common = ["--data", f"arrays:{arrays}", "--model", model_folder, "--out", tmp_path / "out", "--patch.size", "4"]
    refused(amsdn("certify", *common, *words), says)
    assert not (tmp_path / "out").exists()


def test_a_foreign_classifier_is_evaluated_without_any_of_our_model_code(amsdn: Shell, foreign: str, arrays: Path, tmp_path: Path) -> None:
    names = ["pgd-4", "sparse-pgd-5"]
    outcome = amsdn("evaluate", "--data", f"arrays:{arrays}", "--model", f"{foreign}:good", "--out", tmp_path / "out", "--attacks", *names)
    assert outcome.code == 0, outcome
    rows = [json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 12
    assert {r["attack"] for r in rows} == {"clean", *names}
    assert all(r["anomaly_score"] is None for r in rows)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["fly"], "unknown command 'fly'"),
        (["train", "no-such-recipe"], "unknown recipe"),
        (["attack"], "name an attack"),
        (["attack", "no-such-attack"], "unknown attack"),
        (["evaluate", "--attacks", "no-such-attack"], "no-such-attack"),
        (["evaluate", "--samples", "0"], "--samples must be at least 1"),
        (["train", "--limit", "1"], "--limit must be at least 2"),
        (["train", "--device", "abacus"], "--device abacus"),
        (["finetune"], "run amsdn train first"),
        (["predict"], "no image given"),
        (["report"], "no run folder given"),
        (["report", "no/such/run"], "no/such/run"),
        (["certify", "--smoothing.sigma", "0", "--limit", "4"], "sigma must be positive"),
        (["certify", "--smoothing.radii", "0.5", "0.25"], "radii must be at least 0, finite and growing"),
        (["certify", "--smoothing.radii", "-1"], "radii must be at least 0, finite and growing"),
        (["certify", "--certificates", "l3"], "invalid choice 'l3'"),
        (["certify", "--certificates"], "name at least one of l2, patch, l0"),
        (["certify", "--samples", "0"], "--samples must be at least 1"),
        (["certify", "--attacks.samples", "0"], "samples must be at least 1"),
        *((["certify", "--shard", shard], f"--shard {shard}: must be i/n") for shard in ("0/2", "3/2", "x", "1", "-1/2")),
        (["attack", "pgd", "--attack.epsilon", "-1"], "must be positive, got -1"),
        (["attack", "--attack"], "name an attack"),
        (["attack", "--k", "3"], "name an attack"),
    ],
)
def test_words_that_make_no_sense(args: list[str], says: str, amsdn: Shell, tmp_path: Path) -> None:
    refused(amsdn(*args), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args", [["train", "--loop.epochs", "many"], ["train", "--no-such-field", "1"], ["attack", "pgd", "--epsilon", "1/0"]]
)
def test_fields_that_do_not_parse(args: list[str], amsdn: Shell, tmp_path: Path) -> None:
    refused(amsdn(*args), args[-2], "--help")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pgd", "--target", "99"], "no such class"),
        (["pgd", "--target", "²"], "no such class"),
        (["patch-pgd", "--size", "100"], "does not fit"),
        (["deepfool", "--epsilon", "inf"], "finite"),
    ],
)
def test_an_attack_that_makes_no_sense_for_the_data_starts_nothing(
    words: list[str], says: str, amsdn: Shell, arrays: Path, model_folder: Path, tmp_path: Path
) -> None:
    refused(amsdn("attack", *words, "--model", model_folder, "--data", f"arrays:{arrays}", "--out", tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written(amsdn: Shell, arrays: Path, model_folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"  # a file where a folder is wanted: refused for root, too, unlike a read-only folder
    blocked.write_text("in the way")
    common = ["--data", f"arrays:{arrays}", "--out", blocked / "out"]
    refused(amsdn("evaluate", *common, "--model", model_folder, "--attacks", "pgd-4"), str(blocked))
    refused(amsdn("train", *common, "--loop.epochs", "1", "--model.width", "2"), str(blocked))
    refused(amsdn("certify", *common, "--model", model_folder, "--patch.size", "4"), str(blocked))
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize("command", ["train", "evaluate", "certify", "predict"])
def test_a_full_disk(command: str, amsdn: Shell, arrays: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    picture = save(tmp_path / "good.png", np.zeros((16, 16, 3), np.uint8))
    monkeypatch.setattr("os.fsync", full)
    data = ["--data", f"arrays:{arrays}", "--out", tmp_path / "out"]
    args = {
        "train": ["train", *data, "--loop.epochs", "0.2", "--loop.batch-size", "10", "--model.width", "2"],
        "evaluate": ["evaluate", *data, "--model", model_folder, "--attacks", "pgd-4"],
        "certify": ["certify", *data, "--model", model_folder, "--samples", "2", "--patch.size", "4"],
        "predict": ["predict", picture, "--model", model_folder, "--out", tmp_path / "out"],
    }[command]
    outcome = amsdn(*args)
    assert outcome.code == 2
    message = [line for line in outcome.err.replace("\r", "\n").splitlines() if line.startswith("amsdn ")]
    assert len(message) == 1
    assert "No space left on device" in message[0]
    assert not list(tmp_path.rglob("*.partial"))
    assert not list((tmp_path / "out").rglob("model.safetensors"))


def test_data_with_other_classes_than_the_model(amsdn: Shell, model_folder: Path, tmp_path: Path) -> None:
    refused(amsdn("evaluate", "--data", "digits", "--limit", "20", "--model", model_folder, "--out", tmp_path / "out"), "2 classes", "10")
