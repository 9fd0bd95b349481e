"""The benchmark's own machinery, on a network that costs nothing and without any peer library."""

import json
from pathlib import Path

import attacks
import peer_attacks
import pytest
import rows
import summary
import torch
import victims
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
TINY = ["--samples", "4", "--steps-scale", ".02", "--repeats", "1", "--libraries"]


class Toy(nn.Module):
    """Ten classes by a random linear map of a coarse view."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.avg_pool2d(x, 8).flatten(1))


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The benchmark on the toy; its output file."""

    def images(n: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return x, Toy()(x).argmax(1)

    monkeypatch.setattr(attacks, "missing", lambda: None)
    monkeypatch.setattr(attacks, "load_resnet20", lambda: Toy().eval().requires_grad_(False))
    monkeypatch.setattr(attacks, "load_cifar10", images)
    monkeypatch.setattr(attacks, "keep_freed_memory", lambda: None)
    return tmp_path / "out" / "attacks.json"


def test_the_counter_counts_images_in_both_directions():
    counted = victims.Counted(Toy())
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        counted(x)
    assert (counted.forwards, counted.backwards, counted.calls) == (3, 0, 1)
    leaf = x.clone().requires_grad_(True)
    logits = counted(leaf)
    first = torch.autograd.grad(logits[:, 0].sum(), leaf, retain_graph=True)[0]
    torch.autograd.grad(logits[1, 1], leaf)
    assert (counted.forwards, counted.backwards, counted.calls) == (6, 6, 2)
    assert counted.seconds > 0
    plain = x.clone().requires_grad_(True)
    assert torch.equal(first, torch.autograd.grad(counted.model(plain)[:, 0].sum(), plain)[0])
    assert not counted.training
    counted.reset()
    assert (counted.forwards, counted.backwards, counted.calls, counted.seconds) == (0, 0, 0, 0.0)


def test_a_dry_run_measures_every_row_and_goes_on_where_it_stopped(toy, capsys):
    command = [*TINY, "--out", str(toy)]
    assert attacks.main(command) == 0
    document = json.loads(toy.read_text())
    assert set(document["runs"]) == {f"{row.name}/{regime}/amsdn/0" for row in rows.ROWS for regime in row.budgets}
    assert len(document["summary"]) == len(document["runs"])
    assert {"command", "commit", "date", "hardware", "cpu", "versions", "libraries"} <= set(document["sessions"][0])
    for run in document["runs"].values():
        assert run["samples"] == run["batch"] == 4
        assert 0 <= run["standing"] <= 4
        assert run["forwards"] >= 4
        assert 0 < run["model_seconds"] < run["seconds"]

    lost, kept = "pgd-50/usual/amsdn/0", "deepfool/nearest/amsdn/0"
    before = document["runs"].pop(lost)
    toy.write_text(json.dumps(document))
    capsys.readouterr()
    assert attacks.main(command) == 0
    again = json.loads(toy.read_text())
    assert again["runs"][kept] == document["runs"][kept], "a finished run was measured again"
    assert {k: again["runs"][lost][k] for k in ("forwards", "backwards", "standing")} == {
        k: before[k] for k in ("forwards", "backwards", "standing")
    }
    assert capsys.readouterr().out.count("in the model, ") == 1

    assert attacks.main([*command, "--samples", "3"]) == 1
    assert "made with" in capsys.readouterr().err


def test_every_peer_gets_the_settings_that_ours_gets():
    for row in rows.ROWS:
        if row.family is None:
            continue
        assert peer_attacks.libraries(row.family), f"{row.name}: no peer attack of family {row.family}"
        for budget in row.budgets.values():
            ours, theirs = row.attack(budget, 1.0), row.peer_settings(budget, 1.0)
            for name in {"num_steps", "num_queries", "epsilon", "k", "size", "population", "learning_rate", "overshoot", "alpha"} & set(
                theirs
            ):
                assert getattr(ours, name) == theirs[name], f"{row.name}: {name}"


def _run(seconds: float, standing: int, forwards: int = 100) -> dict:
    timing = {"seconds": seconds, "cpu_seconds": seconds, "model_seconds": seconds / 2}
    passes = {"forwards": forwards, "backwards": forwards, "calls": 10}
    return {"budget": "linf 8/255", "samples": 10, "batch": 10, "standing": standing, "median_spent": None, **timing, **passes}


def test_the_verdict_never_hides_a_weaker_attack():
    runs = {
        "pgd/usual/amsdn/0": _run(1, 4),
        "pgd/usual/amsdn/1": _run(3, 4),
        "pgd/usual/foolbox/0": _run(3, 3),
        "pgd/usual/foolbox/1": _run(9, 3),
    }
    (entry,) = summary.summarise(runs, {})
    assert entry["fastest_peer"] == "foolbox"
    assert entry["cells"]["foolbox"]["times_ours"] == 3, "ratios are taken within a repeat"
    assert entry["cells"]["amsdn"]["robust_accuracy"] == 0.4
    assert "leaves more standing than foolbox" in entry["verdict"]
    runs["pgd/usual/foolbox/0"]["seconds"] = runs["pgd/usual/foolbox/1"]["seconds"] = 1.5
    (entry,) = summary.summarise(runs, {})
    assert "of its passes" in entry["verdict"], "below the goal the verdict says where the time goes"


def test_the_page_shows_what_the_run_measured():
    page, evidence = ROOT / "docs" / "attacks" / "peers.md", ROOT / "results" / "benchmarks" / "attacks.json"
    text = page.read_text()
    assert summary.START in text
    assert summary.END in text
    if evidence.exists():
        assert summary.drawn(json.loads(evidence.read_text()), text) == text, "python benchmarks/attacks.py --docs docs/attacks/peers.md"
