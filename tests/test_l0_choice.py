"""The comparison behind the choice of the l0 certificate: its ablation bound, and that it runs."""

import itertools
import json
from pathlib import Path

import l0_choice
import pytest
import torch

from amsdn.data import ArraySplit, Dataset


@pytest.mark.parametrize(("pixels", "keep"), [(6, 1), (7, 3), (8, 5)])
def test_the_ablation_radius_is_the_theorem(pixels: int, keep: int) -> None:
    subsets = list(itertools.combinations(range(pixels), keep))
    for probability in torch.linspace(0.3, 1, 141).double().tolist():
        touched = [sum(bool(set(s) & set(range(r))) for s in subsets) / len(subsets) for r in range(pixels + 1)]
        held = [r for r in range(pixels + 1) if probability - touched[r] > 0.5 + 1e-9]
        near = any(abs(probability - t - 0.5) < 1e-9 for t in touched)
        assert near or l0_choice.ablation_radius(probability, pixels, keep) == max(held, default=-1)


def test_what_a_plurality_would_certify() -> None:
    votes = torch.tensor([[3] * 40 + [5] * 15 + [1] * 9, [1] * 32 + [5] * 32, [5] * 34 + [1] * 30, [1] * 34 + [5] * 30])
    answer, radius = l0_choice.plurality(torch.nn.functional.one_hot(votes, 10).float())
    assert answer.tolist() == [3, 1, 5, 1]
    assert radius.tolist() == [12, 0, 1, 2]


def test_an_ablation_keeps_that_many_pixels_in_all_channels() -> None:
    x = torch.rand(50, 3, 6, 7)
    keep = torch.arange(50) % 43
    seen = l0_choice.ablated(x, keep, torch.Generator().manual_seed(0))
    present = seen != l0_choice.ABSENT
    assert torch.equal(present.all(1).flatten(1).sum(1), keep)
    assert torch.equal(present.any(1), present.all(1))
    assert torch.equal(torch.where(present, seen, x), x)


def test_the_comparison_runs_and_writes_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)

    def split(n: int) -> ArraySplit:
        return ArraySplit(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=draws), torch.randint(10, (n,), generator=draws))

    dataset = Dataset("cifar10", split(128), split(8), split(4), tuple("abcdefghij"), 32)
    monkeypatch.setattr(l0_choice, "load_dataset", lambda name, root: dataset)
    monkeypatch.setattr(l0_choice, "keep_freed_memory", lambda: None)
    out = tmp_path / "choice.json"
    flags = "--minutes .0001 --samples 4 --width 2 --grids 2 3 --keeps 20 --n0 3 --n 5 --out"
    assert l0_choice.main([*flags.split(), str(out)]) == 0
    written = json.loads(out.read_text())
    ours = ["partition 2x2", "partition 2x2, plurality", "partition 3x3", "partition 3x3, plurality"]
    assert [r["method"] for r in written["rows"]] == [*ours, "ablation K=20", "ablation K=20, more samples"]
    assert [r["passes"] for r in written["rows"]] == [4, 4, 9, 9, 8, 8]
    assert all(1 >= r["clean"] >= r["r=1"] >= r["r=12"] >= 0 for r in written["rows"])
