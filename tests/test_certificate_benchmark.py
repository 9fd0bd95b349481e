"""The benchmark of certificates: what it counts, on tables and images small enough to count by hand; and that it can be resumed."""

import json
from pathlib import Path

import certificate_art
import certificate_l2
import certificate_patch
import certificate_tables
import certification
import numpy as np
import pytest
import torch
from certificate_bench import Bench, mean_of
from scipy.stats import binom
from torch import Tensor, nn
from victims import Counted

from amsdn.data import ArraySplit, Dataset
from amsdn.errors import InputError
from amsdn.evaluation.certifier import Sample
from amsdn.evaluation.smoothing import fixed_radius
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.models.double_masking import ChallengerMasking, DoubleMasking
from amsdn.models.masking_rounds import answer
from amsdn.records import CertRecord

ROOT = Path(__file__).parents[1]
TINY = ["--images", "3", "--minutes", "1e-6", "--reference-n", "64", "--batch-size", "64", "--attacked", "2", "--attack-steps", "2"]
TINY += ["--confidence", ".3", "--grids", "2", "--quiet", "--only", "l2", "patch", "l0"]


class Toy(nn.Module):
    """Ten classes by a random linear map of a coarse view."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(48, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.avg_pool2d(x, 8).flatten(1) - 0.5)


class Constant(nn.Module):
    """Class 1 of two, whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[0.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), 2)


def images(count: int) -> Tensor:
    """Coarse noise: of 200 images the one that the toy is surest of, then those that it is least sure of, on which masks disagree."""
    coarse = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = nn.functional.interpolate(coarse, scale_factor=8)
    with torch.no_grad():
        lead = Toy()(x).topk(2).values
    order = (lead[:, 0] - lead[:, 1]).argsort()
    return x[torch.cat([order[-1:], order[:-1]])[:count]]


# --- l2 -----------------------------------------------------------------------------------------------------------------


def test_a_published_log_gives_back_the_hits_behind_its_radii(tmp_path: Path) -> None:
    path, hits = tmp_path / "log.tsv", [60_000, 90_000, 99_990, 100_000]
    rows = [f"{i}\t0\t0\t{fixed_radius(h, 100_000, 0.001, 0.25)}\t{i % 2}\t1.0" for i, h in enumerate(hits)]
    path.write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows, "9\t0\t-1\t0.0\t0\t1.0"]))
    p, correct = certificate_l2.read_log(path, 0.25)
    assert p == pytest.approx([0.6, 0.9, 0.9999, 1.0, 0.5], abs=2e-9)
    assert correct.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("name", list(certificate_l2.procedures(0.25, 1, 1)))
def test_the_replay_spends_and_certifies_what_the_certifier_does(name: str) -> None:
    """On a classifier whose hit probability is 1, where nothing is random."""
    config = certificate_l2.procedures(0.25, 960, 128)[name]
    radius, samples = certificate_l2.simulate(config, np.array([1.0, 1.0]), np.random.default_rng(0))
    certifier = SmoothingCertifier(Constant().eval(), config)
    (_, claims), *_ = certifier.certify(iter([Sample(0, images(1)[0])]))
    assert samples.tolist() == [claims["l2"].samples] * 2
    assert radius == pytest.approx([claims["l2"].radius] * 2)


def test_the_replay_certifies_nothing_without_hits() -> None:
    radius, samples = certificate_l2.simulate(SmoothingConfig(radii=(0.25,)), np.array([0.0]), np.random.default_rng(0))
    assert radius.tolist() == [-1]
    assert samples[0] < 200


def test_the_expected_share_against_all_outcomes() -> None:
    config = SmoothingConfig(0.25, (), fixed=True, n=60)
    p, correct = np.array([0.5, 0.8, 0.95, 1.0, 0.99]), np.array([True, True, True, True, False])
    for radius in (0.0, 0.1, 0.25, 0.3):
        enough = [(r := fixed_radius(h, 60, config.alpha, 0.25)) is not None and r >= radius for h in range(61)]
        expected = [binom.pmf(range(61), 60, q)[enough].sum() for q in p[correct]]
        assert certificate_l2.expected_share(config, p, correct, radius) == pytest.approx(sum(expected) / 5)
    assert certificate_l2.expected_share(config, p, correct, 9.0) == 0


def row(sample_id: int, radius: float, *, correct: bool = True) -> CertRecord:
    return CertRecord(sample_id, "", 0, "l2", 0, 0 if correct else 1, radius, correct, 100, 0.5)


def test_points_are_lost_on_the_shared_images_alone() -> None:
    reference = [row(0, 0.3), row(1, 0.25), row(2, 0.1), row(3, 0.9)]
    ours = [row(0, 0.25), row(1, 0.0), row(2, 0.25), row(3, 0.9, correct=False), row(4, 0.0), row(5, 0.25)]
    found = certificate_l2.lost(reference, ours, 0.25)
    assert (found["n"], found["only_reference"], found["only_ours"], found["points"]) == (4, 2, 1, 25)
    assert found["low"] < 50 < found["high"], "the interval is of what only the reference certified"
    assert certificate_l2.lost(reference, [row(9, 1.0)], 0.25)["n"] == 0


# --- patch --------------------------------------------------------------------------------------------------------------


def test_passes_on_tables_counted_by_hand() -> None:
    same = torch.ones(3, 3, dtype=torch.int64)
    assert certificate_patch.row_by_row(same, 1) == 6
    assert certificate_patch.row_by_row(same, 0) == 1
    assert certificate_patch.their_algorithm_1(same, 3) == 3
    assert certificate_patch.their_challenger(same) == 3
    # masks 1, 2 say 1 and 2; mask 0 and the majority (of equals, the smallest) say 0
    table = torch.tensor([[0, 0, 2], [0, 1, 2], [2, 2, 2]])
    assert certificate_patch.row_by_row(table, 0) == 3  # 00, 01, 02
    assert certificate_patch.their_algorithm_1(table, 3) == 3 + 1 + 3  # mask 1 is refuted at once, mask 2 confirmed by its row
    assert certificate_patch.their_challenger(table) == 3 + 2  # 0 beats 1, loses to 2
    nobody = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 2]])
    assert certificate_patch.their_algorithm_1(nobody, 3) == 3 + 1
    assert certificate_patch.their_challenger(nobody) == 3 + 1
    assert certificate_patch.defence_pairs(36) == 666


def test_a_disagreer_costs_its_row_up_to_what_refutes_it() -> None:
    """One that is confirmed costs M passes, one that is refuted by its third view three; the answer is its class, or the majority."""
    for last, answered in ((1, 1), (0, 0)):
        table = torch.zeros(4, 4, dtype=torch.int64)
        table[3, :] = table[:, 3] = 1
        table[3, 2] = table[2, 3] = last
        assert answer(table[None], 2).item() == answered
        assert certificate_patch.their_algorithm_1(table, 2) == 4 + (4 if last else 3)


@pytest.mark.parametrize("kind", [DoubleMasking, ChallengerMasking])
@pytest.mark.parametrize("coarser", [(), (2,)])
def test_passes_of_an_answer_are_those_that_reach_the_classifier(kind: type[DoubleMasking], coarser: tuple[int, ...]) -> None:
    counted = Counted(Toy())
    defence = kind(counted, 5, 4, coarser=coarser, confidence=0.2).eval()
    answers, passes = certificate_patch.answered(defence, images(6))
    assert int(passes.sum()) == counted.forwards
    assert answers.tolist() == defence(images(6)).argmax(1).tolist()
    assert int(passes.max()) > 16, "no image disagrees: the test tests nothing"


# --- the run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The benchmark on the toy, with more words for the command line; its output and its work folder are in the attributes."""
    x = images(4)
    with torch.no_grad():
        y = Toy()(x).argmax(1)
    split = ArraySplit((x * 255).to(torch.uint8), y)
    data = Dataset("toy", split, split, split, tuple("abcdefghij"), 32)

    def benchmark(*words: str) -> int:
        return certification.main([*TINY, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), *words])

    for module in (certification, certificate_art):
        monkeypatch.setattr(module, "open_model", lambda model, device: Toy().eval())
        monkeypatch.setattr(module, "open_data", lambda *_: data)
    monkeypatch.setattr(certification, "keep_freed_memory", lambda: None)
    benchmark.out, benchmark.work = tmp_path / "out.json", tmp_path / "work"
    return benchmark


def test_a_dry_run_measures_every_part_and_is_resumed(run, capsys, tmp_path) -> None:
    assert run() == 0
    document = json.loads(run.out.read_text())
    fixed, *ours = document["l2"]
    assert fixed["images"] == 1, "the dear reference stops when its minutes are over"
    assert [line["images"] for line in ours[:3]] == [3, 3, 3]
    assert [list(line["lost"]) for line in document["l2"]] == [["0.25", "0.5"], ["0.25"], ["0.5"], ["0.25", "0.5"], ["0.25", "0.5"]]
    assert all(line["lost"]["0.25"]["n"] == 1 for line in ours if "0.25" in line["lost"])
    by_masks = {line["masks"]: line for line in document["patch"]["certificates"]}
    assert {name: line["side"] for name, line in by_masks.items()} == {
        "6x6": 9,
        "6x6, 2x2 first": 9,
        "6x6, 2x2 in 2x2 first": 9,
        "4x4": 11,
        "4x4, 2x2 first": 11,
        "3x3": 14,
    }
    plain = {name: line["plain"]["passes"] for name, line in by_masks.items() if line["plain"]}
    assert plain == {"6x6": 666, "4x4": 136, "3x3": 45}
    assert all(line["plain"]["only_ours"] == 0 for line in by_masks.values() if line["plain"])
    assert len(document["patch"]["inference"]) == 12
    for line in document["patch"]["inference"]:
        if "their_algorithm_1" in line:
            assert line["their_algorithm_1"]["mean"] <= line["algorithm_1"]["mean"] + 1e-9, "blocks look at no fewer views than one by one"
    assert document["l0"][0]["passes"]["mean"] == 4
    assert {"command", "commit", "date", "hardware", "versions", "parts"} <= set(document["sessions"][0])

    kept = next((run.work / "measured").glob("patch-3-*challenger*.json"))
    kept.unlink()
    before = {path: path.stat().st_mtime_ns for path in run.work.rglob("*.json*")}
    capsys.readouterr()
    assert run() == 0
    again = json.loads(run.out.read_text())
    assert {part: again[part] for part in ("l2", "patch", "l0")} == {part: document[part] for part in ("l2", "patch", "l0")}
    assert kept.exists(), "what was lost is measured again"
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "what was kept is not"
    assert certificate_tables.tables(again) in capsys.readouterr().out

    page = tmp_path / "docs" / "cost.md"
    assert run("--docs", str(page)) == 0
    assert certificate_tables.drawn(again, page.read_text()) == page.read_text()
    with pytest.raises(InputError, match="markers"):
        certificate_tables.drawn(again, "no markers")

    assert run("--sigma", ".5") == 1
    assert "another sigma" in capsys.readouterr().err
    assert run("--sigma", ".5", "--work", str(tmp_path / "other")) == 1
    assert "was made with" in capsys.readouterr().err
    assert run("--images", "0") == 1


def test_the_memory_of_a_certificate_does_not_grow_with_its_samples(run) -> None:
    found = certificate_art.probe("ours", "640", "toy", "toy", "", "cpu", ".25", "64")
    assert found["peak"]["host"] >= found["before"]["host"] > 0
    assert found["grown"]["host"] == pytest.approx(found["peak"]["host"] - found["before"]["host"])
    predictions, radii, samples = certificate_art.ours(Constant().eval(), images(2), 2, 0.25, 640, 64)
    assert (predictions, samples) == ([1, 1], 2 * (128 + 640))
    assert radii == pytest.approx([fixed_radius(640, 640, 0.001, 0.25)] * 2)


def test_what_is_measured_once_is_kept(tmp_path: Path) -> None:
    bench = Bench(
        Toy(),
        ArraySplit(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        10,
        torch.device("cpu"),
        tmp_path,
        2,
        1.0,
        0.25,
        8,
    )
    assert [bench.once("a/b", lambda n=n: {"n": n}) for n in (1, 2)] == [{"n": 1}, {"n": 1}]
    assert bench.once("c", lambda: 3) == 3


def test_means() -> None:
    assert mean_of([]) is None
    assert mean_of([7]) == {"n": 1, "mean": 7, "low": None, "high": None}
    found = mean_of([1, 3])
    assert found is not None
    assert (found["mean"], found["high"] - found["mean"]) == (2, pytest.approx(1.96))


def test_the_goals_say_when_they_are_missed() -> None:
    lost = {"0.25": {"points": 0.3, "n": 50, "low": 0, "high": 1}}
    l2 = [{"procedure": "sequential, r = .25", "samples": {"mean": 1600.0}, "lost": lost, "images": 60}]
    patch = {
        "certificates": [
            {"masks": "6x6", "passes": {"mean": 60.1}, "certified_right": {"value": 0.4}, "plain": {"only_ours": 1, "images": 5}}
        ]
    }
    verdicts = [text.split(":")[0] for text in certificate_tables.goals({"l2": l2, "patch": patch})]
    assert verdicts == ["met", "not met", "not met", "not met"]


def test_the_page_shows_what_the_run_measured() -> None:
    page, evidence = ROOT / "docs" / "certificates" / "cost.md", ROOT / "results" / "benchmarks" / "certification.json"
    if not evidence.exists():
        pytest.skip("not measured yet")
    text = page.read_text()
    assert certificate_tables.drawn(json.loads(evidence.read_text()), text) == text, f"benchmarks/certification.py --docs {page}"
