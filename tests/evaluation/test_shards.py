"""Parts of the work: each piece once, whoever does it."""

from pathlib import Path

import pytest
from evaluation_toys import eval_row
from hypothesis import given
from hypothesis import strategies as st

from amsdn.errors import InputError
from amsdn.evaluation.shards import WHOLE, Shard, every_shard, read_shards
from amsdn.records import EvalRecord, RecordLog


@given(st.lists(st.integers()), st.integers(1, 12))
def test_every_piece_is_in_exactly_one_shard_in_its_order(pieces: list[int], count: int) -> None:
    places = list(range(len(pieces)))
    parts = [Shard(i, count).of(places) for i in range(1, count + 1)]
    assert sorted(place for part in parts for place in part) == places
    assert all(place % count == i for i, part in enumerate(parts) for place in part)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(list(part) == sorted(part) for part in parts)
    assert WHOLE.of(pieces) == pieces


@pytest.mark.parametrize("count", [1, 2, 10])
def test_a_shard_reads_as_it_is_written(count: int) -> None:
    for index in range(1, count + 1):
        shard = Shard(index, count)
        assert Shard.parse(str(shard)) == shard
        assert shard.whole == (count == 1) == (shard == WHOLE)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "x", "1", "-1/2", "1/2/3", "1 /2", "", "1/2\n", "²/3"])
def test_what_is_no_shard_is_one_clear_line(text: str) -> None:
    with pytest.raises(InputError, match="must be i/n with i from 1 to n") as caught:
        Shard.parse(text)
    assert text.strip() in str(caught.value)


@pytest.mark.parametrize("numbers", [(0, 2), (3, 2), (1, 0), (-1, 2)])
def test_a_shard_that_does_not_exist(numbers: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{numbers[0]}/{numbers[1]}: must be i/n"):
        Shard(*numbers)


def test_files_of_shards(tmp_path: Path) -> None:
    assert Shard(2, 4).file("rows.jsonl") == "rows.2-of-4.jsonl"
    assert WHOLE.file("rows.jsonl") == "rows.jsonl"
    for name in ("rows.jsonl", "rows.2-of-4.jsonl", "other.jsonl", "rows.json"):
        (tmp_path / name).touch()
    assert sorted(path.name for path in tmp_path.glob(every_shard("rows.jsonl"))) == ["rows.2-of-4.jsonl", "rows.jsonl"]


def test_rows_of_all_files_are_read_as_one(tmp_path: Path) -> None:
    assert read_shards(tmp_path / "nowhere", "rows.jsonl", EvalRecord) == {}
    nan = float("nan")
    for name, ids in (("rows.jsonl", [0, 1]), ("rows.1-of-2.jsonl", [1, 2]), ("rows.9-of-9.jsonl", [5])):
        RecordLog(tmp_path / name, EvalRecord).append(eval_row(i, anomaly_score=nan) for i in ids)
    rows = read_shards(tmp_path, "rows.jsonl", EvalRecord)  # not-a-number does not contradict itself
    assert sorted(key[0] for key in rows) == [0, 1, 2, 5]
    assert all(row.key == key for key, row in rows.items())
    RecordLog(tmp_path / "rows.2-of-2.jsonl", EvalRecord).append([eval_row(5, correct=False)])
    with pytest.raises(InputError, match=r"contradicts another file of the folder on sample 5; delete rows\..-of-.\.jsonl"):
        read_shards(tmp_path, "rows.jsonl", EvalRecord)
