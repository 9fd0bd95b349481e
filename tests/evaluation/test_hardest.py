import re
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_toys import Images, eval_row
from report_toys import write_rows, write_run

from amsdn.errors import InputError
from amsdn.evaluation.hardest import hardest
from amsdn.evaluation.hardest_pictures import FILE, keep_hardest
from amsdn.evaluation.report import build_report
from amsdn.evaluation.table import complete_table
from amsdn.records import EvalRecord, read_records

HEADLINE = {"patch": 8.0, "sparse": 20.0}
ATTACKS = {"p4": ("patch", 4.0), "p8": ("patch", 8.0), "s5": ("sparse", 5.0), "s20": ("sparse", 20.0)}
# By sample: the attacks that break it. 5 is wrong when clean, 4 never falls, 3 falls to s20 with 5 pixels, 6 is 2 with a smaller margin.
BROKEN: dict[int, set[str]] = {0: {"p8"}, 1: {"p4", "p8", "s5", "s20"}, 2: {"s20"}, 3: {"s20"}, 4: set(), 5: set(ATTACKS), 6: {"s20"}}


def rows() -> list[EvalRecord]:
    made = [eval_row(i, correct=i != 5, margin=0.5 if i == 6 else 1.0) for i in BROKEN]
    for name, (family, budget) in ATTACKS.items():
        for i, broken in BROKEN.items():
            spent = 5.0 if (i, name) == (3, "s20") else budget
            made.append(eval_row(i, name, correct=name not in broken and i != 5, family=family, budget=budget, spent=spent))
    return made


def test_ranks_are_those_found_by_hand() -> None:
    found = hardest(complete_table(rows()), HEADLINE)
    assert [h.sample_id for h in found] == [1, 3, 6, 0, 2]  # most attacks, then 5/20, then 20/20 and 8/8 by margin and id
    assert [(h.fallen, h.attacks) for h in found] == [(4, 4), *[(1, 4)] * 4]
    assert [(b.family, b.spent, b.share, b.attack) for b in found[0].breaks] == [("sparse", 5.0, 0.25, "s5"), ("patch", 4.0, 0.5, "p4")]
    assert found[0].breaks[0].prediction == 2
    assert hardest(complete_table(rows()), HEADLINE, number=2) == found[:2]


def test_order_of_rows_changes_nothing_but_the_headline_can() -> None:
    assert hardest(complete_table(rows()[::-1]), HEADLINE)[0].sample_id == 1
    cheap = hardest(complete_table(rows()), {"patch": 80.0, "sparse": 20.0})
    assert [h.sample_id for h in cheap] == [1, 0, 3, 6, 2]  # 8/80 is less than 5/20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_run(tmp_path / "run", headline=HEADLINE)
    write_rows(made / "eval.jsonl", rows())
    return made


def split(side: int = 8) -> Images:
    return Images(torch.rand(7, 3, side, 2 * side, generator=torch.Generator().manual_seed(0)), torch.ones(7, dtype=torch.int64))


def page(folder: Path) -> str:
    return build_report({"toy": folder}, folder / "out", title="A title").read_text()


def test_pictures_are_the_clean_images_and_the_same_bytes_every_time(folder: Path) -> None:
    keep_hardest(folder, split(), HEADLINE)
    first = (folder / FILE).read_bytes()
    keep_hardest(folder, split(), HEADLINE)
    assert (folder / FILE).read_bytes() == first
    with np.load(folder / FILE, allow_pickle=False) as stored:
        assert stored["ids"].tolist() == [1, 3, 6, 0, 2]
        assert np.array_equal(stored["images"], (split().images[[1, 3, 6, 0, 2]] * 255).round().byte().numpy())
    assert len(re.findall(r'<img src="data:[^"]+" alt="Image \d+, truly class-1">', page(folder))) == 5


def test_large_images_are_reduced(folder: Path) -> None:
    keep_hardest(folder, split(side=100), HEADLINE)
    with np.load(folder / FILE) as stored:
        assert stored["images"].shape == (5, 3, 32, 64)


def test_pictures_of_other_images_are_not_shown(folder: Path) -> None:
    keep_hardest(folder, split(), {"patch": 8.0, "sparse": 5.0})
    assert "<img" not in page(folder)
    (folder / FILE).unlink()
    text = page(folder)
    assert "<img" not in text
    assert "falls to 4 of 4 attacks" in text


def test_where_nothing_falls_there_is_no_file(folder: Path) -> None:
    keep_hardest(folder, split(), HEADLINE)
    write_rows(folder / "eval.jsonl", [r for r in read_records(folder / "eval.jsonl", EvalRecord) if r.attack == "clean"])
    keep_hardest(folder, split(), HEADLINE)
    assert not (folder / FILE).exists()
    assert "hardest" not in page(folder).split("<main>")[1].lower()


GOOD = {"ids": np.arange(2), "labels": np.arange(2), "images": np.zeros((2, 3, 4, 4), np.uint8)}
FOREIGN = {
    "floats": ({"images": np.zeros((2, 3, 4, 4))}, "float64"),
    "no images": ({"images": np.zeros((0, 3, 4, 4), np.uint8)}, "shape"),
    "huge": ({"images": np.zeros((2, 3, 65, 4), np.uint8)}, "shape"),
    "other ids": ({"ids": np.arange(3)}, "one whole number"),
    "pickled": ({"labels": np.array([object()] * 2)}, "not a readable"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_in_one_line(name: str, folder: Path) -> None:
    change, message = FOREIGN[name]
    np.savez(folder / FILE, **{**GOOD, **change})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message) as caught:
        page(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 torn", b"\x93NUMPY", b"hello"])
def test_broken_files_are_refused_in_one_line(data: bytes, folder: Path) -> None:
    (folder / FILE).write_bytes(data)
    with pytest.raises(InputError, match=re.escape(f"{FILE}: not a readable")) as caught:
        page(folder)
    assert "\n" not in str(caught.value)
