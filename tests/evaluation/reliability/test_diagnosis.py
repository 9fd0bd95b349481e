"""A whole diagnosis believes attacks on an honest network, and says why it does not believe those on a flawed one."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import SIDE, Flawed, Honest, Quantised, ScaledUp, images

from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.reliability.diagnosis import (
    Diagnosis,
    Reliability,
    diagnose,
    l2_diagnosis,
    linf_diagnosis,
    patch_diagnosis,
    sparse_diagnosis,
)

CONFIG = EvaluateConfig(keep_examples=0)
THREATS: dict[str, Diagnosis] = {
    "linf": linf_diagnosis(8 / 255),
    "l2": l2_diagnosis(0.5),
    "patch": patch_diagnosis(3, SIDE, 30),
    "sparse": sparse_diagnosis(4, SIDE, 30),
}


class Split:
    """Random images with the labels an honest network gives them."""

    def __init__(self, labels: nn.Module, count: int = 40) -> None:
        self.images = images(count)
        with torch.no_grad():
            self.labels = labels(self.images).argmax(1)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def diagnosed(model: nn.Module, out: Path, threats: Mapping[str, Diagnosis] = THREATS) -> Reliability:
    inner = model.inner if isinstance(model, Flawed) else model
    return diagnose(model.eval(), Split(inner), out, threats, 40, CONFIG, progress=False)


def test_an_honest_network_is_believed_under_every_threat(tmp_path: Path) -> None:
    found = diagnosed(Honest(), tmp_path)
    assert {threat: found.verdict(threat) for threat in THREATS} == dict.fromkeys(THREATS, "yes")
    written = json.loads((tmp_path / "reliability.json").read_text())
    assert {name: told["reliable"] for name, told in written["threats"].items()} == dict.fromkeys(["model", *THREATS], "yes")


@pytest.mark.parametrize("flaw", [Quantised, ScaledUp])
def test_a_network_without_gradients_is_not(flaw: type, tmp_path: Path) -> None:
    found = diagnosed(flaw(Honest()), tmp_path, {"linf": THREATS["linf"]})
    assert found.verdict("linf").startswith("no, because ")


def test_it_resumes_without_doing_anything_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = diagnosed(Honest(), tmp_path, {"linf": THREATS["linf"]})
    rows = (tmp_path / "reliability" / "linf" / "eval.jsonl").read_bytes()
    again = diagnosed(Honest(), tmp_path, {"linf": THREATS["linf"]})
    assert (tmp_path / "reliability" / "linf" / "eval.jsonl").read_bytes() == rows
    assert again.as_dict() == first.as_dict()
