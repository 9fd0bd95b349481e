import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_toys import Detecting, FlipPixels, cert_row, eval_row, images
from report_toys import N, add_certificates, add_crosscheck, add_evasion, add_examples, write_rows, write_run

from amsdn.errors import InputError
from amsdn.evaluation.certificate_panels import _curves
from amsdn.evaluation.certification import certify_split
from amsdn.evaluation.crosscheck import Checked, conclude
from amsdn.evaluation.evaluate import EvaluateConfig, evaluate
from amsdn.evaluation.report import build_report, load_runs, terminal_table
from amsdn.evaluation.smoothing import SmoothedClassifier
from amsdn.evaluation.smoothing_attack import RecheckConfig, checked, recheck_smoothed
from amsdn.evaluation.smoothing_certifier import SmoothingCertifier
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.records import EvalRecord, read_records

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects headings, headline values and pictures, and fails on unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.row: str | None = None
        self.in_value = False
        self.values: dict[str, list[str]] = {}
        self.headings: list[int] = []
        self.images: list[dict[str, Any]] = []
        self.headers_without_scope = 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        have = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            identity = have.get("id") or ""
            self.row = identity.removeprefix("row-") if identity.startswith("row-") else None
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.images.append(have)
        if tag == "th" and "scope" not in have:
            self.headers_without_scope += 1
        self.in_value = tag == "span" and have.get("class") == "value"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.in_value = False

    def handle_data(self, data: str) -> None:
        if self.in_value and self.row:
            self.values.setdefault(self.row, []).append(data)


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """The defended model with everything a run can hold, and a plain one with less."""
    defended, plain = write_run(tmp_path / "defended"), write_run(tmp_path / "plain", defended=False, detector=False)
    add_certificates(defended)
    add_certificates(plain, radius=0.3)
    add_crosscheck(defended)
    add_examples(defended)
    add_examples(defended, "pixels")
    return {"defended": defended, "plain": plain}


def build(runs: dict[str, Path], out: Path, title: str = "A title") -> tuple[str, dict[str, Any]]:
    page = build_report(runs, out, title=title)
    assert page == out / "report.html"
    return page.read_text(), json.loads((out / "report.json").read_text())


def headline(numbers: dict[str, Any]) -> dict[str, Any]:
    return {row["key"]: row for row in numbers["headline"]}


def shares(row: dict[str, Any]) -> dict[str, float | None]:
    return {name: cell and pytest.approx(cell["value"]) for name, cell in row["cells"].items()}


def test_headline_is_what_one_counts_by_hand(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = headline(build(runs, tmp_path / "out")[1])
    assert shares(rows["clean"]) == {"defended": 19 / 20, "plain": 1.0}
    assert shares(rows["worst:patch"]) == {"defended": 12 / 20, "plain": 1 / 20}  # 0..6 and 19 are broken, 6 already at size 2
    assert shares(rows["worst:sparse"]) == {"defended": 17 / 20, "plain": 1 / 20}
    assert shares(rows["union"]) == {"defended": 11 / 20, "plain": 1 / 20}
    assert shares(rows["certified:l2:0.25"]) == {"defended": 8 / 10, "plain": 8 / 10}
    assert shares(rows["certified:l2:0.5"]) == {"defended": 8 / 10, "plain": 0.0}
    assert "certified:l2:0.75" not in rows  # beyond every certificate
    assert rows["detection:patch"]["cells"]["defended"]["n"] == 5  # the strongest attack's successes
    assert shares(rows["detection:patch"]) == {"defended": 1.0, "plain": None}


@pytest.mark.parametrize("order", [("defended", "plain"), ("plain", "defended")])
def test_differences_are_claimed_only_where_intervals_do_not_meet(order: tuple[str, str], runs: dict[str, Path], tmp_path: Path) -> None:
    rows = headline(build({name: runs[name] for name in order}, tmp_path / "out")[1])
    for row in rows.values():
        mine, other = row["cells"].values()
        if mine and other:
            apart = mine["low"] > other["high"] or mine["high"] < other["low"]
            assert row["differences"][0]["beyond"] == apart
            assert row["differences"][0]["points"] == pytest.approx(100 * (mine["value"] - other["value"]))
    assert rows["worst:patch"]["differences"][0]["beyond"]
    assert not rows["clean"]["differences"][0]["beyond"]


def test_page_and_terminal_show_the_numbers_of_the_json(runs: dict[str, Path], tmp_path: Path) -> None:
    text, numbers = build(runs, tmp_path / "out")
    wanted = {row["key"]: [f"{100 * c['value']:.1f}" for c in row["cells"].values() if c] for row in numbers["headline"]}
    assert Page(text).values == wanted
    table = terminal_table(runs)
    shown = [found for line in table.splitlines() if (found := re.findall(r"(\d+\.\d) \[(\d+\.\d), (\d+\.\d)\]", line))]
    for row, found in zip(numbers["headline"], shown, strict=True):
        assert found == [tuple(f"{100 * c[k]:.1f}" for k in ("value", "low", "high")) for c in row["cells"].values() if c]
        label = row["label"].replace("\u00a0", " ")
        assert any(
            re.sub(r"\W", "", label).startswith(re.sub(r"\W", "", line.split("   ")[0])) for line in table.splitlines() if line[:1].strip()
        ), label


def test_same_folders_give_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    build(runs, tmp_path / "a")
    build(runs, tmp_path / "b")
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_page_is_self_contained_and_well_formed(runs: dict[str, Path], tmp_path: Path) -> None:
    text, _ = build(runs, tmp_path / "out")
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", text)
    page = Page(text)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.headers_without_scope == 0
    assert page.images
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)


def test_everything_a_user_names_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>"
    data = {"name": evil, "split": "test", "classes": [evil] * 3}
    folder = write_run(tmp_path / "run", data=data, command=evil, hardware=evil, versions={evil: evil})
    add_examples(folder)
    add_crosscheck(folder)
    other = write_run(tmp_path / "other", defended=False, data=data)
    text, numbers = build({evil: folder, f"{evil} again": other}, tmp_path / "out", title=evil)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10
    assert numbers["title"] == evil
    Page(text)


REMOVALS: dict[str, Callable[[dict[str, Path]], None]] = {
    "certificates": lambda runs: [(f / "cert.jsonl").unlink() for f in runs.values()] and None,
    "comparison's certificates": lambda runs: (runs["plain"] / "cert.jsonl").unlink(),
    "examples": lambda runs: [p.unlink() for p in (runs["defended"] / "examples").iterdir()] and None,
    "cross-check": lambda runs: (runs["defended"] / "crosscheck.json").unlink(),
    "anomaly maps": lambda runs: add_examples(runs["defended"], maps=False),
    "provenance": lambda runs: [(f / "run.json").write_text("{}") for f in runs.values()] and None,
    "comparison": lambda runs: runs.pop("plain") and None,
}


@pytest.mark.parametrize("what", REMOVALS)
def test_missing_pieces_leave_a_whole_page(what: str, runs: dict[str, Path], tmp_path: Path) -> None:
    REMOVALS[what](runs)
    text, numbers = build(runs, tmp_path / "out")
    assert Page(text).values["worst:patch"][0] == "60.0"
    assert (what == "certificates") == ("certified:l2:0.25" not in headline(numbers))
    assert (what == "examples") == ('id="pictures"' not in text)
    assert (what == "comparison") == ("no comparison model" in text)


def test_model_without_detector_has_no_detector_columns(tmp_path: Path) -> None:
    text, numbers = build({"plain": write_run(tmp_path / "run", detector=False)}, tmp_path / "out")
    assert not any(row["group"] == "detection" for row in numbers["headline"])
    assert "AUROC" not in text
    assert 'id="detector"' not in text


def test_an_attack_on_the_detector_gets_its_own_row_and_leaves_the_comparison_alone(tmp_path: Path) -> None:
    folders = {"defended": write_run(tmp_path / "defended"), "plain": write_run(tmp_path / "plain", defended=False, detector=False)}
    add_evasion(folders["defended"])
    build_report(folders, tmp_path / "page", title="A title")
    rows = {row["key"]: row for row in json.loads((tmp_path / "page" / "report.json").read_text())["headline"]}
    unnoticed = rows["unnoticed:patch"]["cells"]
    assert unnoticed["defended"]["value"] == 5 / N  # 1 to 4 by the evader; 19 is wrong, unnoticed, without any attack
    assert unnoticed["plain"] is None
    assert "1 of them against the detector too" in rows["unnoticed:patch"]["note"]
    assert "unnoticed:sparse" not in rows
    page = (tmp_path / "page" / "report.html").read_text()
    assert "must stay unnoticed too" in page
    assert "No attack on these tried to escape the detector: changed pixels" in page
    assert "no difference is claimed there" not in page  # the evader, which the plain model cannot meet, does not spoil the others


def test_run_of_clean_images_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [r for r in read_records(folder / "eval.jsonl", EvalRecord) if r.family == "clean"]
    write_rows(folder / "eval.jsonl", rows)
    text, numbers = build({"run": folder}, tmp_path / "out")
    assert [row["key"] for row in numbers["headline"]] == ["clean", "alarms"]
    assert Page(text).values["clean"] == ["95.0"]


def test_other_attack_settings_or_images_are_not_compared(tmp_path: Path) -> None:
    runs = {"a": write_run(tmp_path / "a"), "b": write_run(tmp_path / "b", strength="more steps")}
    rows = headline(build(runs, tmp_path / "out")[1])
    assert rows["clean"]["differences"][0]["comparable"]
    assert not any(rows[key]["differences"][0]["comparable"] for key in ("worst:patch", "worst:sparse", "union"))
    kept = [r for r in read_records(runs["b"] / "eval.jsonl", EvalRecord) if r.sample_id < 10]
    write_rows(runs["b"] / "eval.jsonl", kept)
    text, numbers = build(runs, tmp_path / "out")
    assert not headline(numbers)["clean"]["differences"][0]["comparable"]
    assert "no difference is claimed" in text


def test_samples_without_every_row_are_dropped_and_counted(runs: dict[str, Path], tmp_path: Path) -> None:
    path = runs["defended"] / "eval.jsonl"
    write_rows(path, read_records(path, EvalRecord)[:-3])
    text, numbers = build({"defended": runs["defended"]}, tmp_path / "out")
    assert numbers["runs"]["defended"]["summary"]["samples"] == N - 3
    assert "3 images lack rows" in text


def test_violation_is_shown_loudly(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "defended, ℓ₂: no violation in 18 attacked images" in build(runs, tmp_path / "out")[0]
    add_crosscheck(runs["defended"], violations=2)
    text, numbers = build(runs, tmp_path / "out")
    assert "defended, ℓ₂: 2 violations" in text
    assert "plain: not run" in text
    assert numbers["runs"]["defended"]["crosscheck"]["violations"] == 2


def add_defence(folder: Path, radius: float = 5.0) -> None:
    """Ten patch certificates, six of them for ``radius``; attacks on the first four images leave three right. Another folder is stale."""
    certificates = [cert_row(i, radius if i < 6 else 0.0, certificate="patch") for i in range(10)]
    certificates += [
        replace(c, config_hash="d", certificate="patch-detection", prediction=-1, radius=0.0, correct=False) for c in certificates
    ]
    write_rows(folder / "cert.jsonl", certificates)
    for name, right in (("now", 3), ("before", 0)):
        rows = [eval_row(i) for i in range(4)]
        rows += [eval_row(i, "hit", correct=i < right, family="patch", budget=5.0, spent=5.0) for i in range(4)]
        (folder / "patch-defence" / name).mkdir(parents=True)
        write_rows(folder / "patch-defence" / name / "eval.jsonl", rows)
    kinds = {"patch": Checked("patch", 0, 0, (), folder="patch-defence/now"), "patch-detection": Checked("patch-detection", 0, 0, ())}
    conclude(folder, list(kinds.values()))


def test_the_attacked_defence_is_compared_on_the_same_images(tmp_path: Path) -> None:
    add_defence(write_run(tmp_path / "run"), radius=4.0)
    text, _ = build({"toy": tmp_path / "run"}, tmp_path / "out")
    assert "toy, patch, dashed: what hit left" in text
    assert "on the first 4 of the certified images. On these: patch 5×5, 75.0 % right and 0.0 % certified." in text
    assert "toy, patch: nothing to compare" in text
    assert "100.0 % alarms without an attack" in text
    assert "Certified patch of any size or alarm" in text  # and not 1×1, which nobody asked for


def test_a_certified_curve_never_lies_above_what_is_proved(tmp_path: Path) -> None:
    add_certificates(write_run(tmp_path / "run"), radius=0.32)  # between two points of the grid
    [run] = load_runs({"toy": tmp_path / "run"})
    [curve] = _curves(run, "l2", 0)
    for left, right in pairwise(curve.points):
        assert left.x == right.x or left.y == right.y, "a slope claims something between two radii"
        assert left.x <= right.x
        assert left.y >= right.y
    assert max(p.x for p in curve.points if p.y > 0) == pytest.approx(0.3)


def test_pictures_are_the_first_images_that_were_right(runs: dict[str, Path], tmp_path: Path) -> None:
    text, _ = build(runs, tmp_path / "out")
    outcomes = re.findall(r"Image (\d+), truly class-0: <b>(\w+)</b>, (alarm raised|no alarm)", text)
    # Saved image 0 was wrong when clean. Alarms come from the rows: patch-b fools 2..6, pixels fools 0 and 10.
    assert outcomes[:4] == [
        ("1", "holds", "no alarm"),
        ("2", "fooled", "alarm raised"),
        ("3", "fooled", "alarm raised"),
        ("4", "fooled", "alarm raised"),
    ]
    assert [number for number, *_ in outcomes] == ["1", "2", "3", "4"] * 2
    assert len(Page(text).images) == 2 * 4 * 4


def test_reproduction_details_are_on_the_page(tmp_path: Path) -> None:
    info = {
        "command": ["amsdn train --seed 3", "amsdn evaluate --seed 3"],
        "commit": "c0ffee",
        "versions": {"torch": "9.9"},
        "seconds": {"train": 125},
    }
    text, numbers = build({"run": write_run(tmp_path / "run", **info)}, tmp_path / "out")
    for wanted in ("amsdn train --seed 3\namsdn evaluate --seed 3", "c0ffee", "torch 9.9", "train 2 min"):
        assert wanted in text
    assert numbers["runs"]["run"]["run"]["commit"] == "c0ffee"


def test_folder_that_evaluation_really_writes(tmp_path: Path) -> None:
    folder, model = tmp_path / "run", Detecting().eval()
    split, smoothing = images(6, model), SmoothingConfig(n0=10, n=100, sigma=0.05, radii=(0.02,))
    evaluate(model, split, {"flip-1": FlipPixels(1), "flip-2": FlipPixels(2)}, folder, EvaluateConfig(batch_size=6), progress=False)
    certificates = certify_split(SmoothingCertifier(model, smoothing), split, folder, sample_ids=[0, 3], progress=False)
    recheck = RecheckConfig(steps=2, draws=2, n=50)
    checks = recheck_smoothed(SmoothedClassifier(model, smoothing.sigma), split, certificates, config=recheck, progress=False)
    conclude(folder, [checked(checks, smoothing.alpha, recheck.alpha)])
    (folder / "run.json").write_text("{}")
    text, numbers = build({"toy": folder}, tmp_path / "out")
    assert shares(headline(numbers)["clean"]) == {"toy": 4 / 6}  # two images are mislabelled on purpose
    assert len(Page(text).images) == 4 * 4
    assert "toy, ℓ₂: no violation" in text


def test_terminal_table_fits_whatever_the_names(tmp_path: Path) -> None:
    names = ["a defended model with a very long name indeed, longer than a column", "plain", "third " * 9]
    runs = {name: write_run(tmp_path / str(i), defended=i != 1) for i, name in enumerate(names)}
    add_certificates(runs[names[0]])
    table = terminal_table(runs)
    assert max(map(len, table.splitlines())) <= 100
    assert table.count("Clean accuracy") == 2  # one block per comparison
    single = terminal_table({names[0]: runs[names[0]]})
    assert "difference" not in single
    assert "60.0 [" in single


def _damage(path: str, data: bytes | None) -> Callable[[dict[str, Path]], None]:
    def apply(runs: dict[str, Path]) -> None:
        target = runs["defended"] / path
        target.unlink() if data is None else target.write_bytes(data)

    return apply


DAMAGES: dict[str, tuple[Callable[[dict[str, Path]], Any], str]] = {
    "no runs": (lambda runs: runs.clear(), "no run folder"),
    "no folder": (lambda runs: runs.update(defended=Path("nowhere")), "nowhere: no such run folder"),
    "no run.json": (_damage("run.json", None), "run.json: cannot be read"),
    "torn run.json": (_damage("run.json", b'{"seed": 1'), "run.json: not valid JSON"),
    "binary run.json": (_damage("run.json", b"\xff\xfe\x00"), "run.json: not valid JSON"),
    "list run.json": (_damage("run.json", b"[]"), "run.json: not a JSON object"),
    "odd run.json": (_damage("run.json", b'{"data": "digits"}'), "run.json: not a JSON object"),
    "NaN in run.json": (_damage("run.json", b'{"seed": NaN}'), "run.json: not valid JSON"),
    "no rows": (_damage("eval.jsonl", None), "eval.jsonl: cannot read"),
    "empty rows": (_damage("eval.jsonl", b""), "no clean rows"),
    "broken row": (_damage("eval.jsonl", b"{}\n"), "eval.jsonl:1: not a EvalRecord row"),
    "broken certificate": (_damage("cert.jsonl", b"[1]\n"), "cert.jsonl:1"),
    "broken cross-check": (_damage("crosscheck.json", b"[]"), "crosscheck.json: not a cross-check"),
    "broken examples": (_damage("examples/patch-b.npz", b"PK\x03\x04 torn"), "patch-b.npz: not a readable"),
    "empty examples": (_damage("examples/patch-b.npz", b""), "patch-b.npz: not a readable"),
    "pickled examples": (lambda runs: add_examples(runs["defended"], label=np.array([object()] * 6)), "patch-b.npz: not a readable"),
    "short examples": (lambda runs: add_examples(runs["defended"], label=np.zeros(5)), "differ in length"),
    "flat examples": (lambda runs: add_examples(runs["defended"], clean=np.zeros((6, 9))), "images have shapes"),
    "odd maps": (lambda runs: add_examples(runs["defended"], anomaly_map_adv=np.zeros((6, 2, 8, 8))), "anomaly maps have shape"),
    "other data": (lambda runs: (runs["plain"] / "run.json").write_text('{"data": {"name": "other"}}'), "on the same data"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_input_is_one_line_and_writes_nothing(damage: str, runs: dict[str, Path], tmp_path: Path) -> None:
    apply, message = DAMAGES[damage]
    apply(runs)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        build_report(runs, tmp_path / "out", title="A title")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_is_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write the report"):
        build_report(runs, tmp_path / "file", title="A title")


def test_the_headline_budgets_are_those_that_the_first_run_names(tmp_path: Path) -> None:
    chosen = load_runs({"a": write_run(tmp_path / "a")})[0].summary["curves"]
    family, smallest = next((f, points[0]["budget"]) for f, points in chosen.items() if len(points) > 1)
    runs = {"a": write_run(tmp_path / "c", headline={family: smallest}), "b": write_run(tmp_path / "b", headline={"linf": 1.0})}
    assert [run.summary["headline"] for run in load_runs(runs)] == [{family: smallest}] * 2
