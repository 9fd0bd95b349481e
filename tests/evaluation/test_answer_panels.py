from dataclasses import replace
from pathlib import Path

import pytest
from report_toys import N, add_evasion, write_rows, write_run

from amsdn.evaluation.answer_panels import EXTREMES, FEW_CLASSES, calibration_charts, class_table
from amsdn.evaluation.headline_rows import headline_rows
from amsdn.evaluation.report import build_report, load_runs
from amsdn.records import EvalRecord, read_records


def with_fields(folder: Path, classes: int = 2) -> Path:
    """The toy run with today's fields: right answers at 90 %, wrong ones at 50 %, maps that hit and overlap by half, several classes."""
    rows = [
        replace(
            r,
            label=r.sample_id % classes,
            confidence=0.9 if r.correct else 0.5,
            pointing=1.0 if r.localisation else None,
            overlap=0.5 if r.localisation else None,
        )
        for r in read_records(folder / "eval.jsonl", EvalRecord)
    ]
    write_rows(folder / "eval.jsonl", rows)
    return folder


def test_reliability_diagrams_show_every_answer_once(tmp_path: Path) -> None:
    charts = calibration_charts(load_runs({"toy": with_fields(write_run(tmp_path / "run"))}))
    assert [(c["title"], c["aside"]) for c in charts] == [("No attack", None), ("Patch 5×5", "patch-b"), ("5 changed pixels", "pixels")]
    for chart in charts:
        assert sum(cells[0]["n"] for _, cells in chart["table"]) == N
    assert [name for name, _ in charts[0]["table"]] == ["47 to 53", "87 to 93"]
    assert "ECE 12.0\u00a0%" in charts[0]["legend"][0][1]  # (19 |1 - .9| + |0 - .5|) / 20


def test_rows_older_than_confidences_have_no_diagram(tmp_path: Path) -> None:
    old = write_run(tmp_path / "old")
    assert calibration_charts(load_runs({"old": old})) == []
    [first, *_] = calibration_charts(load_runs({"new": with_fields(write_run(tmp_path / "new")), "old": old}))
    assert first["names"] == ["new"]
    text = build_report({"old": old}, tmp_path / "out", title="t").read_text()
    assert "ECE" not in text


def test_where_maps_point_is_told_where_it_is_known(tmp_path: Path) -> None:
    new, old = with_fields(write_run(tmp_path / "new")), write_run(tmp_path / "old")
    cells = ['<td class="num">0.800</td>', '<td class="num">100.0</td>', '<td class="num">0.500</td>']
    assert "\n".join(cells) in build_report({"new": new}, tmp_path / "a", title="t").read_text()
    dash = '<td class="num none">–</td>'
    assert "\n".join([cells[0], dash, dash]) in build_report({"old": old}, tmp_path / "b", title="t").read_text()


@pytest.mark.parametrize("classes", [1, 2, FEW_CLASSES, FEW_CLASSES + 1, N])
def test_every_class_is_shown_once_worst_first(classes: int, tmp_path: Path) -> None:
    [run] = load_runs({"toy": with_fields(write_run(tmp_path / "run"), classes)})
    found = class_table(run)
    if found is None:
        assert classes == 1
        return
    (_, first), *more = found["parts"]
    lines = [*first, *found["rest"], *(line for _, last in more for line in last)]
    assert sum(line["n"] for line in lines) == N
    assert len({line["name"] for line in lines}) == found["number"] == len(lines) == classes
    robust = [sum(c.value for c in line["cells"][1:]) for line in lines]
    assert robust == sorted(robust)
    assert bool(found["rest"]) == (classes > FEW_CLASSES)
    assert not more or len(first) == len(more[0][1]) == EXTREMES


def test_right_or_rejected_counts_what_no_attack_gets_past_the_threshold(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    # Clean scores are .01 i, successful attacks score .9, and the detector's own alarm is above .19: no threshold below that is judged.
    rows = {row.key: row for row in headline_rows(load_runs({"toy": folder}))}
    at_one, at_five = rows["rejecting:patch:0.01"], rows["rejecting:patch:0.05"]
    assert at_one.cells[0]
    assert at_five.cells[0]
    assert at_one.cells[0].value == 19 / 20  # all but sample 19, wrong without an attack
    assert at_five.cells[0].value == 19 / 20  # 5 % of false alarms would reject it, and attacks would aim lower
    assert at_one.note == at_five.note == "right and kept when clean: 95.0\u00a0%"
    add_evasion(folder)  # breaks 0 to 4 and scores 0 on all but the first
    [again] = load_runs({"toy": folder})
    cell = next(row.cells[0] for row in headline_rows([again]) if row.key == "rejecting:patch:0.05")
    assert cell
    assert cell.value == 15 / 20


def test_rejection_is_compared_only_where_the_same_attacks_evade(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")

    def comparable() -> bool:
        rows = {row.key: row for row in headline_rows(load_runs({"a": a, "b": b}))}
        [difference] = rows["rejecting:patch:0.05"].differences
        return difference is not None and difference.comparable

    assert comparable()
    add_evasion(a)
    assert not comparable()
    add_evasion(b)
    assert comparable()
