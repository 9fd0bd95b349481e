"""Two runs image by image: counts that can be made by eye, mirrors, and every reason not to claim a difference."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_toys import N, add_certificates, add_evasion, add_settings, write_rows, write_run

from amsdn.errors import InputError
from amsdn.evaluation.comparable import Evaluated
from amsdn.evaluation.comparison import ComparedRow, Comparison, compare, compare_runs
from amsdn.evaluation.comparison_text import as_text
from amsdn.evaluation.statistics import holm
from amsdn.evaluation.table import complete_table
from amsdn.evaluation.terminal import TERMINAL_WIDTH
from amsdn.records import CertRecord, EvalRecord, read_records

Edit = Callable[[EvalRecord], EvalRecord | None]


@pytest.fixture
def a(tmp_path: Path) -> Path:
    """Right but on image 19; broken on 6 by the small patch, on 0 to 6 by the large ones, on 0 and 10 by pixels."""
    return add_settings(write_run(tmp_path / "a"))


@pytest.fixture
def b(tmp_path: Path) -> Path:
    """Right on every clean image, and under every attack only on image 7."""
    return add_settings(write_run(tmp_path / "b", defended=False))


def rows_of(comparison: Comparison) -> dict[str, ComparedRow]:
    assert len({row.key for row in comparison.rows}) == len(comparison.rows)
    return {row.key: row for row in comparison.rows}


def edit(folder: Path, change: Edit) -> Path:
    """Rewrite the rows of a run; None drops one."""
    rows = [changed for row in read_records(folder / "eval.jsonl", EvalRecord) if (changed := change(row)) is not None]
    write_rows(folder / "eval.jsonl", rows)
    return folder


def judge(folder: Path, **verdicts: str) -> None:
    (folder / "reliability.json").write_text(
        json.dumps({"threats": {name: {"reliable": told, "findings": []} for name, told in verdicts.items()}})
    )


def test_counts_are_those_made_by_eye(a: Path, b: Path) -> None:
    rows = rows_of(compare_runs(a, b))
    counts = {
        key: (row.both, row.only_a, row.only_b, row.neither) for key, row in rows.items() if row.group in ("clean", "threat", "alarms")
    }
    assert counts == {
        "clean": (19, 0, 1, 0),
        "threat:patch:2": (1, 17, 0, 2),
        "threat:patch:5": (1, 11, 0, 8),
        "threat:sparse:5": (1, 16, 0, 3),
        "union": (1, 10, 0, 9),
        "alarms": (20, 0, 0, 0),
    }
    attacks = {row.label: (row.both, row.only_a, row.only_b, row.neither) for row in rows.values() if row.group == "attack"}
    assert attacks == {"patch-small": (1, 17, 0, 2), "patch-a": (1, 14, 0, 5), "patch-b": (1, 13, 0, 6), "pixels": (1, 16, 0, 3)}


def test_a_row_is_the_paired_numbers_of_its_counts(a: Path, b: Path) -> None:
    comparison = compare_runs(a, b)
    row = rows_of(comparison)["threat:patch:5"]
    assert (row.n, row.accuracy_a, row.accuracy_b, row.verdict) == (20, 0.6, 0.05, "A")
    assert row.difference == pytest.approx(55)
    assert row.low is not None
    assert row.high is not None
    assert 0 < row.low < 55 < row.high < 100
    assert row.p_value == pytest.approx(2 * 0.5**11)
    tested = [row for row in comparison.rows if row.p_value is not None]
    assert [row.adjusted for row in tested] == holm([row.p_value for row in tested if row.p_value is not None])
    assert rows_of(comparison)["clean"].verdict == "no difference shown"
    narrow = rows_of(compare_runs(a, b, confidence=0.5))["threat:patch:5"]
    assert narrow.low is not None
    assert narrow.low > row.low


def test_a_copy_of_itself_differs_in_nothing(a: Path, tmp_path: Path) -> None:
    add_certificates(a)
    add_evasion(a)
    comparison = compare_runs(a, Path(shutil.copytree(a, tmp_path / "copy")))
    assert comparison.rows
    for row in comparison.rows:
        if row.tested:
            assert (row.only_a, row.only_b, row.difference, row.verdict) == (0, 0, 0, "no difference shown")
            assert (row.p_value, row.adjusted) == (1, 1)
            assert row.low == pytest.approx(-(row.high or 0))
    assert any("same model" in note for note in comparison.notes)
    assert "A better in 0 of 4, B in 0" in comparison.sentence


SWAPPED = str.maketrans("AB", "BA")


def mirrored(row: ComparedRow) -> ComparedRow:
    """The row as the opposite comparison must tell it."""
    turned = dataclasses.replace(
        row,
        accuracy_a=row.accuracy_b,
        accuracy_b=row.accuracy_a,
        only_a=row.only_b,
        only_b=row.only_a,
        verdict=row.verdict.translate(SWAPPED),
        note=row.note.translate(SWAPPED),
    )
    if row.difference is None or row.low is None or row.high is None:
        return turned
    return dataclasses.replace(turned, difference=-row.difference, low=-row.high, high=-row.low)


def check_mirror(there: Comparison, back: Comparison) -> None:
    assert (there.a, there.b, there.images) == (back.b, back.a, back.images)
    assert {note.translate(SWAPPED) for note in there.notes} == set(back.notes)
    for row, opposite in zip(there.rows, back.rows, strict=True):
        wanted = mirrored(row)
        assert (opposite.low, opposite.high) == (wanted.low, wanted.high) or (opposite.low, opposite.high) == pytest.approx(
            (wanted.low, wanted.high)
        )
        assert dataclasses.replace(opposite, low=wanted.low, high=wanted.high) == wanted


def test_swapping_the_runs_mirrors_everything(a: Path, b: Path) -> None:
    add_certificates(a, radius=0.6)
    add_certificates(b, radius=0.3)
    add_evasion(a)  # b has a detector and did not meet it
    judge(a, sparse="no, because random search wins")
    check_mirror(compare_runs(a, b), compare_runs(b, a))


def run_of(outcomes: list[list[bool]], name: str) -> Evaluated:
    """A run of two patch attacks from rows of right or wrong: clean, small patch, large patch."""
    budgets = {"clean": ("clean", 0.0), "small": ("patch", 2.0), "large": ("patch", 5.0)}
    rows = [
        EvalRecord(i, attack, 0, attack, family, budget, budget, 0, 0 if right else 1, right, 0.0, 1, 1, None, None, None)
        for (attack, (family, budget)), hits in zip(budgets.items(), zip(*outcomes, strict=True), strict=True)
        for i, right in enumerate(hits)
    ]
    labels = dict.fromkeys(range(len(outcomes)), 0)
    return Evaluated(name, name, name, ("toy", "test", "f"), complete_table(rows), labels, {}, {"patch": 5.0}, None)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=25))
def test_any_two_runs(outcomes: list[list[bool]]) -> None:
    first, second = run_of([image[:3] for image in outcomes], "first"), run_of([image[3:] for image in outcomes], "second")
    comparison = compare(first, second)
    check_mirror(comparison, compare(second, first))
    rows = rows_of(comparison)
    assert list(rows) == ["clean", "threat:patch:2", "threat:patch:5", "attack:small", "attack:large"]
    assert rows["threat:patch:5"].both + rows["threat:patch:5"].only_a == sum(all(image[:3]) for image in outcomes)
    assert rows["attack:large"].both + rows["attack:large"].only_b == sum(image[3] and image[5] for image in outcomes)
    for row in rows.values():
        assert row.difference is not None
        assert row.low is not None
        assert row.high is not None
        assert row.p_value is not None
        assert row.adjusted is not None
        assert row.both + row.only_a + row.only_b + row.neither == row.n == len(outcomes)
        assert row.low - 1e-9 <= row.difference <= row.high + 1e-9
        assert row.difference == pytest.approx(100 * (row.accuracy_a - row.accuracy_b))
        assert row.p_value <= row.adjusted
        winner = "A" if row.only_a > row.only_b else "B"
        assert row.verdict == (winner if row.adjusted <= 0.05 else "no difference shown")


def test_other_attack_settings_are_told_and_nothing_is_claimed(a: Path, tmp_path: Path) -> None:
    b = add_settings(write_run(tmp_path / "stronger", defended=False, strength="stronger"))
    comparison = compare_runs(a, b)
    rows = rows_of(comparison)
    assert [key for key, row in rows.items() if row.tested] == ["clean", "alarms"]
    assert rows["threat:patch:5"].verdict == "not comparable: the attacks differ, patch-a, patch-b, patch-small had other settings"
    assert rows["threat:patch:5"].accuracy_a == 0.6  # each run's own worst case, without a difference
    assert rows["threat:patch:5"].difference is rows["threat:patch:5"].adjusted is None
    assert rows["union"].verdict.startswith("not comparable")
    assert comparison.sentence.endswith("6 rows cannot be compared.")
    assert "settings differ: patch-a, patch-b, patch-small, pixels" in as_text(comparison)


def test_an_attack_that_only_one_met_spoils_its_budget_and_those_above_only(a: Path, b: Path) -> None:
    edit(b, lambda row: row if row.attack != "patch-b" else None)
    rows = rows_of(compare_runs(a, b))
    assert rows["threat:patch:5"].verdict == "not comparable: the attacks differ, only A met patch-b"
    assert rows["union"].verdict == rows["threat:patch:5"].verdict
    assert rows["threat:patch:2"].verdict == rows["threat:sparse:5"].verdict == "A"
    assert [row.label for row in rows.values() if row.group == "attack"] == ["patch-small", "patch-a", "pixels"]


def test_a_larger_attack_that_only_one_met_counts_against_nobody(a: Path, b: Path) -> None:
    """Its images happen to spend no more than a smaller budget: the run's own worst case counts them, a comparison must not."""
    extra = [
        dataclasses.replace(r, attack="huge", config_hash="huge", budget=8.0, spent=2.0, correct=False, prediction=1)
        for r in read_records(a / "eval.jsonl", EvalRecord)
        if r.attack == "patch-b"
    ]
    with (a / "eval.jsonl").open("a") as f:
        f.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in extra)
    comparison = compare_runs(a, b)
    assert rows_of(comparison)["threat:patch:2"].accuracy_a == 0.9
    assert comparison.a.attacks == ("huge",)
    assert "only A has it: huge" in as_text(comparison)


def test_attacks_on_a_detector_that_only_one_has_are_left_out_and_told(a: Path, tmp_path: Path) -> None:
    add_evasion(a)
    blind = add_settings(write_run(tmp_path / "blind", defended=False, detector=False))
    comparison = compare_runs(a, blind)
    row = rows_of(comparison)["threat:patch:5"]
    assert (row.both, row.only_a, row.verdict) == (1, 11, "A")
    assert row.note == "worst of 3 attacks that both met, without the 1 on A's detector"
    assert any("can only lower A's numbers" in note for note in comparison.notes)
    assert not [row for row in comparison.rows if row.group in ("alarms", "unnoticed")]


def test_going_unnoticed_needs_the_same_attacks_on_both_detectors(a: Path, b: Path) -> None:
    quiet = rows_of(compare_runs(a, b))["unnoticed:patch:5"]
    assert quiet.verdict == "not comparable: no attack tried to stay unnoticed"
    add_evasion(a)
    assert "only A met evader" in rows_of(compare_runs(a, b))["unnoticed:patch:5"].verdict
    add_evasion(b)
    row = rows_of(compare_runs(a, b))["unnoticed:patch:5"]
    assert (row.both, row.only_a, row.only_b, row.neither) == (15, 0, 1, 4)  # 1 to 4 in both; in a also 19, wrong without an attack
    assert row.verdict == "no difference shown"


def test_only_images_with_all_rows_in_both_count(a: Path, b: Path) -> None:
    edit(a, lambda row: row if row.sample_id >= 2 else None)  # 0 and 1 are not there
    edit(b, lambda row: row if row.sample_id != 3 or row.attack != "pixels" else None)  # 3 lacks a row
    comparison = compare_runs(a, b)
    assert (comparison.images, comparison.a.besides, comparison.a.incomplete) == (17, 1, 0)
    assert (comparison.b.besides, comparison.b.incomplete) == (2, 1)
    assert {row.n for row in comparison.rows} == {17}
    assert rows_of(comparison)["threat:patch:5"].only_a == 12 - 1
    assert "17 images have all rows in both runs; besides, A has 1 complete, B 2 complete and 1 incomplete." in as_text(comparison)


def test_certificates_are_compared_at_each_radius_on_the_images_that_both_have(a: Path, b: Path) -> None:
    add_certificates(a, radius=0.6)  # eight of ten right
    right = [CertRecord(i, "c", 0, "l2", 0, 0, 0.3, True, 1100, 0.5) for i in range(4, 14)]
    write_rows(b / "cert.jsonl", right)
    rows = rows_of(compare_runs(a, b))
    assert {row.key for row in rows.values() if row.group == "certified"} == {"certified:l2:0.25", "certified:l2:0.5"}
    low, high = rows["certified:l2:0.25"], rows["certified:l2:0.5"]
    assert (low.n, low.both, low.only_a, low.only_b, low.neither) == (6, 4, 0, 2, 0)
    assert (high.n, high.both, high.only_a, high.only_b, high.neither) == (6, 0, 4, 0, 2)
    write_rows(b / "cert.jsonl", [dataclasses.replace(row, config_hash="sigma") for row in right])
    assert rows_of(compare_runs(a, b))["certified:l2:0.25"].verdict == "not comparable: the l2 certificates were made with other settings"
    write_rows(b / "cert.jsonl", [dataclasses.replace(row, sample_id=15) for row in right[:1]])
    apart = compare_runs(a, b)
    assert not [row for row in apart.rows if row.group == "certified"]
    assert "No image has a l2 certificate in both runs." in apart.notes


def test_rows_of_shards_are_read_as_one(a: Path, b: Path, tmp_path: Path) -> None:
    whole = compare_runs(a, b)
    rows = read_records(b / "eval.jsonl", EvalRecord)
    (b / "eval.jsonl").unlink()
    write_rows(b / "eval.1-of-2.jsonl", rows[::2])
    write_rows(b / "eval.2-of-2.jsonl", rows[1::2])
    assert compare_runs(a, b) == whole


def test_numbers_that_a_run_s_own_checks_refute_are_not_compared(a: Path, b: Path) -> None:
    judge(a, patch="yes", sparse="no, because a single step breaks images that many steps do not")
    judge(b, model="yes", patch="yes", sparse="yes")
    comparison = compare_runs(a, b)
    rows = rows_of(comparison)
    unreliable = {row.label for row in rows.values() if row.verdict == "not comparable: A's number is unreliable"}
    assert unreliable == {"5 changed pixels", "All headline threats", "pixels"}
    assert rows["threat:patch:5"].verdict == "A"
    assert "Reliability of the attacks: A's sparse unreliable (see its reliability.json); no check of B failed." in as_text(comparison)
    judge(b, model="no, because its answers do not repeat")
    rows = rows_of(compare_runs(a, b))
    assert rows["clean"].verdict == "not comparable: B's number is unreliable"
    assert rows["threat:sparse:5"].verdict == "not comparable: A's and B's numbers are unreliable"
    assert compare_runs(a, b).sentence.startswith("Nothing can be claimed")


def test_unchecked_runs_and_families_are_told(a: Path, b: Path) -> None:
    assert "Reliability of the attacks: unchecked in both runs (no reliability.json)." in as_text(compare_runs(a, b))
    judge(a, patch="yes")
    told = "Reliability of the attacks: no check of A failed; A's sparse unchecked; B unchecked (no reliability.json)."
    assert told in " ".join(as_text(compare_runs(a, b)).split())


def test_other_headlines_and_seeds_are_told(tmp_path: Path, a: Path) -> None:
    b = add_settings(write_run(tmp_path / "b", headline={"patch": 2}))
    edit(b, lambda row: dataclasses.replace(row, seed=7))
    comparison = compare_runs(a, b)
    assert "union" not in rows_of(comparison)
    assert any("different headline threats" in note for note in comparison.notes)
    assert "The attacks were started with different seeds: A 0, B 7." in comparison.notes


def test_text_fits_a_terminal_and_ends_with_the_sentence(tmp_path: Path, b: Path) -> None:
    a = add_settings(write_run(tmp_path / "long"))
    for folder in (a, b):
        edit(folder, lambda row: dataclasses.replace(row, attack=row.attack.replace("patch-a", "patch-with-a-name-that-nobody-reads-" * 3)))
    comparison = compare_runs(a, b)
    text = as_text(comparison)
    assert all(len(line) <= TERMINAL_WIDTH for line in text.splitlines()[3:])
    assert " ".join(text.split()).endswith(comparison.sentence)
    assert len({line.rindex("]") for line in text.splitlines() if "[" in line}) == 1


def test_a_run_without_attacks_is_compared_by_what_there_is(a: Path, b: Path) -> None:
    edit(b, lambda row: row if row.family == "clean" else None)
    comparison = compare_runs(a, b)
    assert list(rows_of(comparison)) == ["clean", "alarms"]
    assert len(comparison.a.attacks) == 4
    assert comparison.sentence.startswith("Clean accuracy: no difference shown; false alarms: no difference shown (5 % over all 2 tests")


def relabel(row: EvalRecord) -> EvalRecord:
    return dataclasses.replace(row, label=1) if row.sample_id == 4 else row


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "other data": (lambda b: (b / "run.json").write_text('{"data": {"name": "toys", "split": "test"}}'), "of other data than"),
    "other split": (lambda b: (b / "run.json").write_text('{"data": {"name": "toy", "split": "train"}}'), "of other split than"),
    "other images": (lambda b: add_settings(b, data="others"), "of other images"),
    "no fingerprint": (lambda b: (b / "eval_config.json").write_text("{}"), "lacks the fingerprint"),
    "no settings": (lambda b: (b / "eval_config.json").unlink(), "cannot be read"),
    "no provenance": (lambda b: (b / "run.json").unlink(), "cannot be read"),
    "provenance of another shape": (lambda b: (b / "run.json").write_text('{"data": 3}'), "'data' is no JSON object"),
    "provenance that is no object": (lambda b: (b / "run.json").write_text("[]"), "no JSON object"),
    "headline of words": (lambda b: (b / "run.json").write_text('{"headline": {"patch": "5"}}'), "headline budget"),
    "no rows": (lambda b: (b / "eval.jsonl").unlink(), "missing or empty"),
    "broken rows": (lambda b: (b / "eval.jsonl").write_text('{"sample_id": 3}\n'), "not a EvalRecord row"),
    "no clean rows": (lambda b: edit(b, lambda row: row if row.family != "clean" else None), "no rows of the unattacked images"),
    "other labels": (lambda b: edit(b, relabel), "about the labels of 1 images, the first of them 4"),
    "no common images": (lambda b: edit(b, lambda row: dataclasses.replace(row, sample_id=row.sample_id + N)), "no image has all rows"),
    "broken certificates": (lambda b: (b / "cert.jsonl").write_text("[]\n"), "cert.jsonl:1"),
    "mixed certificates": (
        lambda b: write_rows(b / "cert.jsonl", [CertRecord(i, str(i), 0, "l2", 0, 0, 0.5, True, 1, 1.0) for i in (0, 1)]),
        "several configurations",
    ),
    "labels of certificates": (
        lambda b: write_rows(b / "cert.jsonl", [CertRecord(0, "c", 0, "l2", 2, 2, 0.5, True, 1, 1.0)]),
        "label of image 0",
    ),
    "broken reliability": (lambda b: (b / "reliability.json").write_text("{"), "reliability.json: not the checks of an evaluation"),
    "reliability without a verdict": (
        lambda b: (b / "reliability.json").write_text('{"threats": {"patch": {}}}'),
        "reliability.json: not the checks of an evaluation",
    ),
}


@pytest.mark.parametrize("damage", BAD)
def test_runs_that_cannot_be_compared_are_refused_in_one_line(damage: str, a: Path, b: Path) -> None:
    spoil, says = BAD[damage]
    spoil(b)
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        compare_runs(a, b)
    assert says in str(caught.value)
    assert str(b) in str(caught.value)
    with pytest.raises(InputError):
        compare_runs(b, a)


def test_a_folder_that_is_missing_or_given_twice(a: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run folder"):
        compare_runs(a, tmp_path / "nothing")
    with pytest.raises(InputError, match="is the same folder"):
        compare_runs(a, a / ".." / a.name)
    with pytest.raises(InputError, match="confidence must lie between 0 and 1, got 95"):
        compare_runs(a, add_settings(write_run(tmp_path / "again")), confidence=95)
