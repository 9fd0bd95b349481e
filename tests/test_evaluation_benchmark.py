"""The benchmark of the standard protocol: what stands by hand is in the threat; a killed run goes on; the table says what the file says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluation
import evaluation_by_hand as by_hand
import evaluation_tables as tables
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amsdn.evaluation import protocol
from amsdn.evaluation.protocol import Protocol
from amsdn.threats import PatchRegion, SparsePixels

ABSENT = by_hand.missing()
needs_peers = pytest.mark.skipif(bool(ABSENT), reason=f"{', '.join(ABSENT)} not installed; make peers installs it")
TINY = replace(
    protocol.EFFORTS["standard"],
    curve_steps=2,
    ball_steps=2,
    targets=3,
    square_queries=4,
    patch={"num_steps": 2, "num_queries": 2, "restarts": 1, "margin_restarts": 1},
    sparse={"num_steps": 1, "num_queries": 4, "guided_queries": 4, "guided_restarts": 1},
)


class Toy(nn.Module):
    """Ten classes by a random linear map of a coarse view."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(48, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.avg_pool2d(x, 8).flatten(1) - 0.5)


class Gated(Toy):
    """The toy behind a gate without gradients, which it knows a way around."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())

    def differentiable_surrogate(self) -> Toy:
        plain = Toy()
        plain.matches_forward = True  # type: ignore[assignment]
        return plain.eval()


def images(count: int) -> tuple[Tensor, Tensor]:
    """Noise, and what the toy says of it."""
    x = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x, Toy()(x).argmax(1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command on the toy and four images, the last with a wrong label."""
    monkeypatch.setitem(protocol.EFFORTS, "standard", TINY)
    monkeypatch.setattr(evaluation, "open_model", lambda *_: Toy().eval())
    monkeypatch.setattr(evaluation, "keep_freed_memory", lambda: None)
    x, y = images(8)
    y[3] = (y[3] + 1) % 10
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_images.npy", (255 * x).byte().permute(0, 2, 3, 1).numpy())
        np.save(tmp_path / f"{part}_labels.npy", y.numpy())
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    words = ["--data-root", str(tmp_path), "--samples", "4", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out" / "e.json")]
    threads = torch.get_num_threads()
    yield lambda *more: evaluation.main([*words, *more])
    torch.set_num_threads(threads)


@needs_peers
def test_a_dry_run_measures_both_sides_of_every_threat_and_goes_on_where_it_stopped(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    document = json.loads((tmp_path / "out" / "e.json").read_text())
    assert [line["threat"] for line in document["lines"]] == [
        *(f"patch {s}" for s in (2, 4, 5, 8)),
        *(f"sparse {k}" for k in (1, 5, 10, 20)),
        *("linf 2/255", "linf 4/255", "linf 8/255"),
        *("l2 0.25", "l2 0.5", "l2 1"),
    ]
    assert document["clean"][3] is False
    assert {"command", "commit", "date", "hardware", "versions", "libraries"} <= set(document["sessions"][0])
    for line in document["lines"]:
        for side in ("ours", "by hand"):
            assert len(line[side]["standing"]) == 4
            assert not line[side]["standing"][3], "what is wrong without an attack stands for nobody"
            assert line[side]["seconds"] > 0
            assert line[side]["forwards"] > 0
    assert tables.evaluation_table(document) in capsys.readouterr().out

    partial = tmp_path / "work" / evaluation.PARTIAL
    kept = json.loads(partial.read_text())
    lost = kept["parts"]["by hand"].pop("torchattacks Pixle, sparse 5")
    partial.write_text(json.dumps(kept))
    assert run() == 0
    again = json.loads((tmp_path / "out" / "e.json").read_text())
    assert len(again["sessions"]) == 2
    found = again["parts"]["by hand"].pop("torchattacks Pixle, sparse 5")
    assert again["parts"] == kept["parts"], "what was measured is not measured again"
    assert (found["standing"], found["forwards"]) == (lost["standing"], lost["forwards"])

    assert run("--samples", "3") == 1
    assert "another samples" in capsys.readouterr().err
    assert run("--samples", "0") == 1


@needs_peers
@pytest.mark.parametrize("size", [4, 5])
def test_arts_patch_is_cut_to_its_square(size: int) -> None:
    (x, y), counts = images(3), {}
    model = Toy().eval().requires_grad_(False)
    attacked = by_hand.art_patch(size, 2, 6, counts)(model, model, x, y)
    assert PatchRegion(size).contains(attacked, x).all()
    assert (attacked != x).flatten(1).any(1).all()
    assert counts["patches"] >= len(x)


@needs_peers
@pytest.mark.parametrize("k", [1, 5, 20])
def test_searches_change_at_most_k_pixels(k: int) -> None:
    x, y = images(3)
    model = Toy().eval()
    for attack in (by_hand.one_pixel(k, 40), by_hand.pixle(k, 40)):
        attacked = attack(model, model, x, y)
        assert SparsePixels(k).contains(attacked, x).all()
        assert (attacked != x).any()


@needs_peers
def test_an_image_that_nothing_changes_does_not_end_the_search_for_fewest_values() -> None:
    class Half(Toy):
        """The toy, but sure of bright images."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where((x.mean((1, 2, 3)) > 0.9).unsqueeze(1), 0 * x.mean() + torch.eye(10)[:1], super().forward(x))

    x, _ = images(3)
    x[1] = 1.0
    model = Half().eval().requires_grad_(False)
    y = model(x).argmax(1)
    attacked = by_hand.fewest_values(200)(model, model, x, y)
    assert torch.equal(attacked[1], x[1])
    assert (model(attacked).argmax(1) != y).tolist() == [True, False, True]


@needs_peers
def test_what_lies_outside_of_the_threat_does_not_count(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_images(model: nn.Module, differentiable: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model(x)
        return 1 - x

    cheat = by_hand.Part("cheat", (SparsePixels(5), SparsePixels(3072)), other_images)
    monkeypatch.setattr(by_hand, "parts", lambda protocol: [cheat])
    options = evaluation.parser().parse_args(
        ["--data-root", str(tmp_path), "--samples", "4", "--work", str(tmp_path / "cheat"), "--out", str(tmp_path / "c.json")]
    )
    bench = evaluation.Bench(options)
    bench.theirs(("sparse", 5.0))
    part = bench.document["parts"]["by hand"]["cheat"]
    assert part["standing"]["sparse 5"] == [True, True, True, False]
    assert part["standing"]["sparse 3072"] == [False] * 4
    assert part["outside"] == {"sparse 5": 3, "sparse 3072": 0}
    assert (part["attacked"], part["forwards"]) == (3, 3)


@needs_peers
def test_gradients_go_around_a_gate_and_parts_follow_the_protocols_counts() -> None:
    model, (x, y) = Gated().eval().requires_grad_(False), images(4)
    assert isinstance(by_hand.differentiable(model), Toy)
    assert by_hand.differentiable(Toy()).__class__ is Toy
    standard = Protocol("standard", 32)
    parts = by_hand.parts(standard)
    assert sum(len(part.threats) for part in parts) == 4 + 3 * 4 + 2 * (3 + 2)
    apgd = next(part for part in parts if part.threats[0].budget == 8 / 255)
    attacked = apgd.attack(model, by_hand.differentiable(model), x, y)
    assert (model(attacked).argmax(1) != y).any()


def test_missing_libraries_are_one_clear_line(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(by_hand, "installed", lambda library: library != "foolbox")
    assert run() == 1
    assert "foolbox not installed" in capsys.readouterr().err


def part(name: str, seconds: float, standing: dict[str, list[bool]], **more: Any) -> dict[str, Any]:
    return {"name": name, "seconds": seconds, "wall_seconds": seconds, "forwards": 40, "backwards": 20, "standing": standing, **more}


def document() -> dict[str, Any]:
    """Ten images, nine of them right; of ours the second attack on 20 pixels breaks what the first left."""
    nine = [True] * 9 + [False]
    ours = {
        "sparse-pgd-5": part("sparse-pgd-5", 2.0, {"sparse 5": nine}, evades=False),
        "sparse-pgd-20": part("sparse-pgd-20", 1.0, {"sparse 20": [i < 6 for i in range(10)]}, evades=False),
        "sparse-autoattack-20": part("sparse-autoattack-20", 3.0, {"sparse 20": [2 <= i < 6 for i in range(10)]}, evades=False),
        "sparse-evading-20": part("sparse-evading-20", 7.0, {"sparse 20": [False] * 10}, evades=True),
    }
    hand = {"outside": {"sparse 5": 0, "sparse 20": 4}, "attacked": 9, "counts": {"patches": 3, "larger than the square": 1}}
    theirs = {"both": part("both", 8.0, {"sparse 5": nine, "sparse 20": nine}, **hand)}
    found: dict[str, Any] = {
        "settings": {"model": "m", "data": "d", "protocol": ["standard", 1]},
        "clock": "the wall clock",
        "clean": nine,
        "sessions": [
            {"command": "c", "commit": "abc", "date": "t", "hardware": "h", "versions": {"torch": "2"}, "libraries": {"art": "1"}}
        ],
        "parts": {"ours": ours, "by hand": theirs},
    }
    return found | {"lines": tables.summarise(found)}


def test_a_line_is_the_worst_case_of_its_attacks_and_shares_what_they_share() -> None:
    five, twenty = document()["lines"]
    assert twenty["ours"]["standing"] == [2 <= i < 6 for i in range(10)]
    assert (five["by hand"]["seconds"], twenty["by hand"]["seconds"]) == (4.0, 4.0)
    assert twenty["ours"]["seconds"] == 4.0, "what evades the detector is left out"
    assert (twenty["ours"]["forwards"], twenty["by hand"]["forwards"]) == (80, 20)


def test_the_table_states_ratio_intervals_and_the_paired_test() -> None:
    text = tables.evaluation_table(document())
    assert "| pixels 5 | 2.0 | 4.0 | 2.0 | 4 + 2 | 2 + 1 | 90 [60, 98] | 90 [60, 98] | 1 |" in text
    assert "| **pixels 20** | 4.0 | 4.0 | 1.0 | 8 + 4 | 2 + 1 | 40 [17, 69] | 90 [60, 98] | 0.062 |" in text  # five against none: 2 / 32
    assert "| pixels, all | 6.0 | 8.0 | 1.3 | 12 + 6 | 4 + 2 |  |  |  |" in text
    assert "both 4 of 9 at sparse 20" in text
    assert "Of 3 patches that ART made, 1 were larger" in text
    assert "sparse-evading-20, which also evade the detector, 7.0 s" in text
    assert "`c` at commit abc" in text
