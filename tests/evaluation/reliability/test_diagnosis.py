"""A whole diagnosis believes attacks on an honest network, and says why it does not believe those on a flawed one."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import SIDE, Flawed, Honest, Quantised, ScaledUp, images

from amsdn.attacks import (
    APGDAttack,
    APGDL2Attack,
    APGDTargetedAttack,
    APGDTargetedL2Attack,
    Cascade,
    PatchAutoAttack,
    SparseAutoAttack,
)
from amsdn.evaluation.evaluate import EvaluateConfig, evaluate
from amsdn.evaluation.reliability import Reliability
from amsdn.evaluation.reliability.diagnosis import (
    Diagnosis,
    diagnose,
    l2_diagnosis,
    linf_diagnosis,
    patch_diagnosis,
    row_findings,
    sparse_diagnosis,
    worst_case,
)
from amsdn.records import EvalRecord

CONFIG = EvaluateConfig(keep_examples=0)
LINF = Cascade((APGDAttack(8 / 255, 40), APGDTargetedAttack(8 / 255, 40, n_targets=3)))
L2 = Cascade((APGDL2Attack(0.5, 40), APGDTargetedL2Attack(0.5, 40, n_targets=3)))
PATCH = PatchAutoAttack(3, num_steps=40, num_queries=100, restarts=4, margin_restarts=2)
PIXELS = SparseAutoAttack(4, num_steps=40, num_queries=200, guided_queries=600, guided_restarts=3)
THREATS: dict[str, Diagnosis] = {
    "linf": linf_diagnosis(8 / 255, LINF),
    "l2": l2_diagnosis(0.5, L2),
    "patch": patch_diagnosis(3, SIDE, PATCH, 30),
    "sparse": sparse_diagnosis(4, SIDE, PIXELS, 60),
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
    """The checks after an evaluation by each threat's strongest attack."""
    split = Split(model.inner if isinstance(model, Flawed) else model)
    attacks = {threat: diagnosis.strongest for threat, diagnosis in threats.items()}
    records = evaluate(model.eval(), split, attacks, out, CONFIG, progress=False)
    return diagnose(model, split, out, threats, 40, CONFIG, records=records, progress=False)


def test_more_effort_is_compared_with_the_worst_case_of_the_evaluation() -> None:
    def rows(attack: str, right: list[bool], budget: float = 5.0) -> list[EvalRecord]:
        family = "clean" if attack == "clean" else "patch"
        return [
            EvalRecord(i, attack, 0, attack, family, budget, budget, 0, int(not r), r, 1.0, 1, 1, None, None, None)
            for i, r in enumerate(right)
        ]

    ids, clean = range(100), rows("clean", [True] * 100, 0.0)
    diagnosis = patch_diagnosis(5, 32)
    main = clean + rows("racing", [i >= 50 for i in ids]) + rows("search", [i >= 20 and i < 90 for i in ids])
    worst = worst_case(main, diagnosis, range(60))
    assert worst is not None
    assert worst.tolist() == [i >= 50 for i in range(60)]
    names = [name for name in diagnosis.attacks() if name != "more"]
    checks = clean + [row for name in names for row in rows(name, [True] * 100)]
    whole = worst_case(main, diagnosis, ids)
    for broken_besides, enough in ((0, True), (1, True), (2, False)):
        more = rows("more", [not 50 <= i < 50 + broken_besides for i in ids])
        found = {f.check: f for f in row_findings(checks + more, diagnosis, whole)}["effort is enough"]
        assert (found.passed, found.measured) == (enough, pytest.approx(broken_besides / 100))


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
