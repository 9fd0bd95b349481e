"""The ablations compare at equal cost, count what they say they count, and their intervals are the textbook's."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ablation_consistency
import ablation_tables as tables
import ablations
import numpy as np
import pytest
import torch

from amsdn.models.amsdn import AMSDN, AMSDNConfig

COSTS = {"all parts": {"train": 0.3}, "plain": {"train": 0.15}, "few labels, SSRT first": {"train": 0.3, "pretrain": 0.5}}


@pytest.mark.parametrize("name", COSTS)
def test_every_arm_costs_the_budget(name: str) -> None:
    arm = ablations.ARMS[name]
    first, then = ablations.steps_for(name, arm, COSTS, 1000)
    spent = first * COSTS[name].get("pretrain", 0.0) + then * COSTS[name]["train"]
    assert spent == pytest.approx(1000 * 0.3, rel=0.002)
    assert (first > 0) is (arm.ssrt > 0)
    assert first * COSTS[name].get("pretrain", 0.0) / spent == pytest.approx(arm.ssrt, abs=0.002)


def test_what_costs_the_same_is_measured_once_and_a_step_is_the_difference_of_two_runs(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[tuple[ablations.Job, int, int]] = []

    def seconds(data: Any, job: ablations.Job, turn: int, folder: Path, steps: int) -> float:
        asked.append((job, turn, steps))
        noise = 5.0 if len(asked) % 4 == 0 else 0.0  # every second repetition is disturbed
        return 3.0 + (0.5 if job.stage == "pretrain" else 0.2) * steps + noise

    monkeypatch.setattr(ablations, "_seconds_of_a_run", seconds)
    arms = {name: ablations.ARMS[name] for name in ("all parts", "few labels", "few labels, SSRT first", "plain")}
    costs = ablations.measured_costs(None, arms, tmp_path, 2)  # type: ignore[arg-type]
    assert costs["all parts"]["train"] == pytest.approx(0.2)
    assert costs["few labels, SSRT first"] == {"train": pytest.approx(0.2), "pretrain": pytest.approx(0.5)}
    assert len({job for job, _, _ in asked}) == 3
    assert len(asked) == 3 * 3 * 2 * 2  # jobs, rounds with the first, repetitions, lengths


def test_arms_differ_in_what_they_are_named_for() -> None:
    base = ablations.BASE
    assert base.attention
    assert base.purification
    assert base.fpn
    assert base.bounded_evidence
    off = {name: set(arm.model) for name, arm in ablations.ARMS.items() if arm.model}
    assert off["no FPN"] == {"fpn"}
    assert off["no purification"] == {"purification"}
    assert off["unbounded"] == {"bounded_evidence"}
    assert {pair for pairs in tables.PAIRS.values() for pair in pairs} == set(ablations.ARMS)


def test_only_an_arm_with_a_detector_meets_attacks_that_avoid_it() -> None:
    meets = {name for name, arm in ablations.ARMS.items() if ablations.meets_evading(arm)}
    assert meets == set(ablations.ARMS) - {"no purification", "not evading", "plain", "plain, wider"}
    configs = {name: ablations.train_config(ablations.ARMS[name], 1.0, 0) for name in ("all parts", "not evading", "plain", "no pull")}
    assert [any(a.evades for a in config.attacks) for config in configs.values()] == [True, False, False, True]
    assert [config.loss.feature_pull > 0 for config in configs.values()] == [True, True, True, False]


def row(arm: str, seed: int, patch: int, noticed: int, evading: int | None = None) -> dict[str, Any]:
    """A run's result with 100 images under each attack."""
    found = {
        "clean": {"correct": 900, "samples": 1000},
        "under clean": {"correct": 90, "correct_or_noticed": 91, "alarms": 5, "samples": 100},
        "under patch": {"correct": patch, "correct_or_noticed": noticed, "samples": 100},
        "under pixels": {"correct": 20, "correct_or_noticed": 20, "samples": 100},
        "certified": {"correct": 10, "samples": 100},
    }
    if evading is not None:
        found["under patch-evading"] = {"correct": evading, "correct_or_noticed": evading, "samples": 100}
    return {"arm": arm, "seed": seed, "found": found, "commit": "abc", "hardware": "a CPU"}


def test_noticed_is_judged_by_the_attack_that_hurts_more() -> None:
    assert tables._noticed(row("plain", 0, 30, 30)) == (30, 100)
    assert tables._noticed(row("all parts", 0, 30, 80, evading=45)) == (45, 100)
    assert tables._noticed(row("all parts", 0, 30, 40, evading=60)) == (40, 100)


def test_differences_are_paired_by_seed_with_students_interval() -> None:
    ours = [row("all parts", seed, patch, 0) for seed, patch in ((0, 30), (1, 33), (2, 36))]
    theirs = [row("plain", seed, patch, 0) for seed, patch in ((2, 30), (0, 28), (1, 30), (9, 0))]
    measure = tables.MEASURES["patch"]
    # 2, 3 and 6 points: mean 3.67, standard deviation 2.08, and t(.975, 2) = 4.303
    assert tables.difference(ours, theirs, measure) == f"+3.7 ± {4.302653 * math.sqrt(13 / 3) / math.sqrt(3):.1f}"
    assert tables.difference(ours[:1], theirs, measure) == "+2.0"
    assert tables.difference(ours, theirs[-1:], measure) == "-"


def test_the_page_has_every_arm_and_pools_its_seeds() -> None:
    rows = [row("all parts", seed, 30, 50, 40) for seed in range(3)] + [row("plain", seed, 20, 20) for seed in range(3)]
    half = {"clean": {"correct": 800, "samples": 1000}, "correct": 30, "correct_or_noticed": 40, "samples": 100}
    for r in rows[3:]:
        r["consistency"] = {"views": 4, "commit": "abc", "bare": half | {"alarms": 0}, "occluded": half | {"alarms": 50}}
    settings = {"steps": 10, "samples": 100, "scale": 1.0, "patch": 5, "pixels": 10}
    text = tables.page({"settings": settings, "costs": COSTS, "rows": rows})
    assert "| all parts | 1.00 | 3 | 90.0 [88.9, 91.0] | 30.0 [25.1, 35.4] |" in text
    assert "| plain | 0.50 | 3 |" in text
    assert "| all of them | all parts | plain | +0.0 ± 0.0 | +10.0 ± 0.0 |" in text
    assert text.count("| plain | 4 |") == 1


def test_consistency_has_a_threshold_of_its_own_from_other_images_than_those_attacked() -> None:
    torch.manual_seed(0)
    model = AMSDN.from_config(AMSDNConfig(num_classes=2, variant="compact", width=2, fpn_channels=8, purification=False)).eval()
    seen: list[int] = []

    class Images:
        labels = torch.zeros(60, dtype=torch.int64)

        def __len__(self) -> int:
            return 60

        def subset(self, indices: torch.Tensor) -> "Images":
            seen.extend(indices.tolist())
            return self

        def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.rand(len(indices), 3, 16, 16), self.labels[indices]

    class Data:
        val = Images()

    consistent = ablation_consistency.answering_by(model, 4, Data())  # type: ignore[arg-type]
    assert consistent.has_detector
    assert seen == list(range(30, 60))
    assert float(consistent.detection_threshold) != 0.5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), consistent.parameters(), strict=True))
    assert not ablation_consistency.answering_by(model, 0, Data()).has_detector  # type: ignore[arg-type]


def test_an_image_stands_only_where_it_stands_under_every_attack() -> None:
    class Model:
        def analyze(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=x[:, :2, 0, 0], detected=x[:, 2, 0, 0] > 0)

    def image(right: bool, alarm: bool) -> torch.Tensor:
        return torch.tensor([float(right), 0.5, float(alarm)]).reshape(3, 1, 1)

    standing = ablation_consistency.Standing(Model(), torch.zeros(4, dtype=torch.int64))  # type: ignore[arg-type]
    standing.judge("a", torch.stack([image(True, False), image(False, True), image(True, False), image(False, False)]))
    standing.judge("b", torch.stack([image(True, False), image(True, False), image(False, False), image(True, True)]))
    found = standing.counts()
    assert (found["correct"], found["correct_or_noticed"], found["samples"]) == (1, 2, 4)
    assert found["by_attack"] == {"a": [2, 3], "b": [3, 3]}


@pytest.mark.slow
def test_a_tiny_run_from_the_command_line_resumes_and_ends_in_one_file(tmp_path: Path, monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 300), ("test", 20)):
        np.save(tmp_path / f"{name}_images.npy", rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8))
        np.save(tmp_path / f"{name}_labels.npy", np.arange(count) % 10)
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr(ablations, "BASE", AMSDNConfig(variant="compact", width=2, fpn_channels=8, bounded_evidence=True))
    monkeypatch.setattr(ablations, "ARMS", {name: ablations.ARMS[name] for name in ("all parts", "plain")})
    monkeypatch.setattr(ablations, "BATCH", 64)
    monkeypatch.setattr(ablations, "COST_STEPS", (1, 2))
    words = ["--data-root", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), "--steps", "2"]
    words += ["--seeds", "0", "--samples", "6", "--scale", "0.03", "--cost-rounds", "1", "--threads", "1"]
    assert ablations.main(words) == 0
    first = json.loads((tmp_path / "out.json").read_text())
    assert ablations.main(words) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == first, "nothing is done twice"
    assert [r["arm"] for r in first["rows"]] == ["all parts", "plain"]
    assert first["rows"][0]["found"]["under patch"]["samples"] == 6
    assert "Consistency" not in tables.page(first)
    views = ["--data-root", str(tmp_path), "--work", str(tmp_path / "work"), "--arms", "all parts", "--samples", "4", "--scale", "0.03"]
    assert ablation_consistency.main([*views, "--threads", "1"]) == 0
    assert ablations.main(words) == 0
    gathered = json.loads((tmp_path / "out.json").read_text())
    assert gathered["rows"][0]["consistency"]["occluded"]["samples"] == 4
    assert "consistency" not in gathered["rows"][1]
    assert tables.page(gathered).count("| all parts | none |") == 1
