"""An evaluation in shards, in any order, killed or not, is the undivided one, byte for byte."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation_toys import Detecting, FlipPixels, Images, Linear, Noisy, by_key, images
from torch import Tensor, nn

from amsdn.errors import InputError
from amsdn.evaluation.evaluate import RECORDS, EvaluateConfig, evaluate, hash_of
from amsdn.evaluation.shards import WHOLE, Shard
from amsdn.records import EvalRecord, read_records

CONFIG = EvaluateConfig(seed=3, batch_size=3, keep_examples=7)  # five chunks of 14 samples, pictures from three of them
ATTACKS = {"flip-1": FlipPixels(1), "flip-20": FlipPixels(20)}
SAMPLES = 14


def run(out: Path, shard: Shard = WHOLE, model: nn.Module | None = None, **changes: object) -> list[EvalRecord]:
    model = (Detecting() if model is None else model).eval()
    arguments: dict[str, object] = {"split": SPLIT, "attacks": ATTACKS, "config": CONFIG, "progress": False, **changes}
    return evaluate(model, out=out, shard=shard, **arguments)  # type: ignore[arg-type]


SPLIT = images(SAMPLES, Detecting())


class NeverAsked(Detecting):
    """Detecting by its fingerprint, but must not be asked."""

    __module__, __qualname__ = Detecting.__module__, Detecting.__qualname__

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("nothing is left to attack")


def files(out: Path) -> dict[str, bytes]:
    """What an undivided run leaves behind."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and "-of-" not in p.name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_together_are_the_whole(tmp_path: Path, whole: Path, count: int) -> None:
    chunks = [list(range(start, min(start + 3, SAMPLES))) for start in range(0, SAMPLES, 3)]
    for index in range(count, 0, -1):
        mine = run(tmp_path, Shard(index, count))
        expected = [i for chunk in chunks[index - 1 :: count] for i in chunk]
        assert [(row.attack, row.sample_id) for row in mine] == [(name, i) for name in ("clean", *ATTACKS) for i in expected]
    assert count == 1 or not (tmp_path / RECORDS).exists()
    assert len(list(tmp_path.glob("eval.*-of-*.jsonl"))) == (0 if count == 1 else min(count, len(chunks)))
    rows = run(tmp_path, model=NeverAsked())
    assert by_key(rows) == by_key(read_records(whole / RECORDS, EvalRecord))
    assert files(tmp_path) == files(whole)
    assert sorted(files(whole)) == ["eval.jsonl", "eval_config.json", "examples/flip-1.npz", "examples/flip-20.npz"]


def test_a_stochastic_model_draws_the_same_in_every_shard(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", model=Noisy())
    run(tmp_path / "shards", Shard(2, 2), Noisy())
    assert run(tmp_path / "shards", model=Noisy()) == expected
    assert files(tmp_path / "shards") == files(tmp_path / "whole")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    for index in (1, 2):
        run(out, Shard(index, 2))
    return out


@pytest.mark.parametrize("name", ["eval.1-of-2.jsonl", "eval.2-of-2.jsonl"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.98])
@pytest.mark.parametrize("again", [True, False], ids=["the shard goes on", "the whole makes it up"])
def test_a_killed_shard(tmp_path: Path, whole: Path, sharded: Path, name: str, share: float, again: bool) -> None:
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    before = (out / name).read_bytes()
    (out / name).write_bytes(before[: round(share * len(before))])
    for part in list((out / "examples.parts").glob("*/[03].npz")):
        part.unlink()  # rows without pictures, pictures without rows
    if again:
        run(out, Shard.parse(name[5:11].replace("-of-", "/")))
        assert (out / name).read_bytes() == before
    run(out)
    assert files(out) == files(whole)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_killed_merge_goes_on(tmp_path: Path, whole: Path, sharded: Path, share: float) -> None:
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    rows = (whole / RECORDS).read_bytes()
    (out / RECORDS).write_bytes(rows[: round(share * len(rows))])
    run(out, model=NeverAsked())
    assert files(out) == files(whole)


def test_other_shards_do_what_none_has_done_yet(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, Shard(1, 2))
    assert {r.sample_id for r in run(tmp_path, Shard(2, 3))} == {3, 4, 5, 12, 13}  # chunks 1 and 4; the fourth is there already
    assert {r.sample_id for r in read_records(tmp_path / "eval.2-of-3.jsonl", EvalRecord)} == {3, 4, 5}
    run(tmp_path)
    assert files(tmp_path) == files(whole)


def test_pictures_of_another_choice_are_made_again(tmp_path: Path, whole: Path) -> None:
    for index in (1, 2):
        run(tmp_path, Shard(index, 2), config=EvaluateConfig(seed=3, batch_size=3, keep_examples=4))
    run(tmp_path)
    assert files(tmp_path) == files(whole)
    with np.load(tmp_path / "examples" / "flip-1.npz") as kept:
        assert kept["ids"].tolist() == [*range(7)]


def test_a_broken_part_is_made_again(tmp_path: Path, whole: Path, sharded: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(sharded, out)
    parts = sorted((out / "examples.parts" / hash_of(ATTACKS["flip-1"])).iterdir())
    assert [part.name for part in parts] == ["0.npz", "3.npz", "6.npz"]
    for part, damage in zip(parts, (b"", parts[1].read_bytes()[:300], b"not an archive at all"), strict=True):
        part.write_bytes(damage)
    run(out)
    assert files(out) == files(whole)


def test_an_attack_added_later_leaves_the_parts_of_no_other(tmp_path: Path) -> None:
    run(tmp_path, Shard(1, 2), attacks={"flip-1": FlipPixels(1)})
    run(tmp_path, attacks={"flip-20": FlipPixels(20)})
    assert [p.name for p in (tmp_path / "examples.parts").iterdir()] == [hash_of(ATTACKS["flip-1"])]
    run(tmp_path)
    assert not (tmp_path / "examples.parts").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": EvaluateConfig(seed=3, batch_size=4, keep_examples=7)}, r"another batch_size \(3, now 4\)"),
        ({"config": EvaluateConfig(seed=4, batch_size=3, keep_examples=7)}, r"another seed \(3, now 4\)"),
        ({"model": Detecting(seed=1)}, "another model"),
        ({"sample_ids": range(9)}, "another samples"),
        ({"split": images(SAMPLES, Linear(), seed=5)}, "another data"),
        ({"attacks": {"flip-1": FlipPixels(2)}}, "another attack named 'flip-1'"),
        ({"attacks": {"other": FlipPixels(1)}}, "in the run there as 'flip-1'"),
    ],
)
@pytest.mark.parametrize("shard", [WHOLE, Shard(2, 2)], ids=str)
def test_a_shard_with_other_settings_is_refused(tmp_path: Path, change: dict[str, object], message: str, shard: Shard) -> None:
    run(tmp_path, Shard(1, 2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path, shard, **change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_shards_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    run(tmp_path, Shard(1, 2))
    mine = tmp_path / "eval.1-of-2.jsonl"
    (tmp_path / "eval.1-of-3.jsonl").write_bytes(mine.read_bytes().replace(b'"forwards": 1', b'"forwards": 2'))
    with pytest.raises(InputError, match="contradicts another file"):
        run(tmp_path)


def test_a_row_that_is_there_stays_when_its_picture_is_made_again(tmp_path: Path) -> None:
    run(tmp_path, Shard(1, 2))
    mine = tmp_path / "eval.1-of-2.jsonl"
    mine.write_bytes(mine.read_bytes().replace(b'"forwards": 2', b'"forwards": 3'))  # another machine may have rounded otherwise
    expected = read_records(mine, EvalRecord)
    assert any(row.forwards == 3 for row in expected)
    shutil.rmtree(tmp_path / "examples.parts")
    rows = {row.key: row for row in run(tmp_path)}
    assert all(rows[row.key] == row for row in expected)


def test_rows_of_shards_without_settings_are_refused(tmp_path: Path) -> None:
    run(tmp_path, Shard(1, 2))
    (tmp_path / "eval_config.json").unlink()
    with pytest.raises(InputError, match=r"has eval\.1-of-2\.jsonl but no eval_config\.json"):
        run(tmp_path)


def test_the_images_of_a_shard_are_its_own(tmp_path: Path) -> None:
    fetched: list[int] = []

    class Watched(Images):
        def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            fetched.extend(indices.tolist())
            return super().fetch(indices)

    run(tmp_path, Shard(2, 2), split=Watched(SPLIT.images, SPLIT.labels))
    assert set(fetched[SAMPLES:]) == {3, 4, 5, 9, 10, 11}  # after the fingerprint of the data
