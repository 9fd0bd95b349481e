"""Records survive kills, refuse nonsense, and a configuration's hash changes with any of its values."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amsdn.errors import InputError
from amsdn.records import CertRecord, EvalRecord, RecordLog, canonical, config_hash, read_records, write_atomic

ROW = CertRecord(0, "abc", 0, "l2", 1, 1, 0.25, True, 100, 0.5)
ROWS = [dataclasses.replace(ROW, sample_id=i) for i in range(4)]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "cert.jsonl"
    log = RecordLog(path, CertRecord)
    log.append(ROWS[:3])
    log.append(ROWS[3:])
    log.append([])
    assert read_records(path, CertRecord) == ROWS
    assert list(RecordLog(path, CertRecord)) == ROWS
    assert log.missing(range(6), "abc", 0) == [4, 5]
    assert log.missing([0], "other", 0) == [0]


@pytest.mark.parametrize("cut", range(0, 400, 13))
def test_a_line_torn_by_a_kill_is_dropped_and_written_again(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cert.jsonl"
    RecordLog(path, CertRecord).append(ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    log = RecordLog(path, CertRecord)
    kept = whole[:cut].count(b"\n")
    assert list(log) == ROWS[:kept]
    log.append(ROWS[kept:])
    assert path.read_bytes() == whole


def test_rows_from_before_a_field_was_added_still_load(tmp_path: Path) -> None:
    row = EvalRecord(0, "abc", 0, "pgd", "linf", 0.1, 0.1, 1, 2, False, -1.0, 9, 8, None, None, None)
    written = dataclasses.asdict(dataclasses.replace(row, evades=True, success=True))
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in written.items() if k not in gone}) + "\n" for gone in ({"evades", "success"}, {})))
    assert read_records(path, EvalRecord) == [row, dataclasses.replace(row, evades=True, success=True)]
    assert (row.evades, row.success) == (False, None)


def test_a_row_written_twice_is_a_bug(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "cert.jsonl", CertRecord)
    log.append(ROWS[:1])
    with pytest.raises(AssertionError, match="written twice"):
        log.append(ROWS[:1])


@pytest.mark.parametrize("line", ["not json", '{"sample_id": 1}', "[1, 2]", '{"unknown": 1}'])
def test_a_complete_line_that_is_no_row_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "cert.jsonl"
    RecordLog(path, CertRecord).append(ROWS[:1])
    with path.open("a") as f:
        f.write(line + "\n")
    with pytest.raises(InputError, match=r"cert\.jsonl:2"):
        read_records(path, CertRecord)


@dataclass(frozen=True)
class One:
    a: float = 1.0
    b: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Two:
    a: float = 1.0
    b: tuple[int, ...] = (1, 2)


def test_the_hash_sees_every_value_and_the_class() -> None:
    variants = [One(), One(a=2.0), One(b=(2, 1)), One(b=(1,)), Two(), {"one": One()}]
    assert len({config_hash(v) for v in variants}) == len(variants)
    assert config_hash(One()) == config_hash(One())
    with pytest.raises(TypeError, match="no configuration value"):
        canonical(object())


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_plain_values_are_their_own_canonical_form(value: Any) -> None:
    assert canonical(value) == value


def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
