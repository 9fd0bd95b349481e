"""The history of a killed and resumed run is that of an undisturbed one, but for the seconds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from together import LOOP, Net, Probe, forty_images

from amsdn.errors import InputError
from amsdn.training.history import HISTORY_FILE, History, read_history
from amsdn.training.loop import Batch, Trained, train


def run(folder: Path, every: float = 0, die_at: int | None = None) -> Trained:
    def before(step: int, batch: Batch) -> None:
        if step == die_at:
            raise KeyboardInterrupt

    return train(Probe(before), Net(), forty_images(), replace(LOOP, checkpoint_every_s=every, log_every=1), folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_history(folder / HISTORY_FILE)]


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "loss": 0.3', b'{"step": 7, "loss": 1.0}\n{"step": 8, "lo'])
def test_rows_beyond_the_state_are_dropped_before_going_on(torn: bytes, tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", die_at=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", every=1e9, die_at=6)  # logs steps 4 to 6, keeps none of them
    path = tmp_path / "cut" / HISTORY_FILE
    assert [row["step"] for row in read_history(path)] == [1, 2, 3, 4, 5, 6]
    path.write_bytes(path.read_bytes() + torn)
    run(tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 9))


def test_a_row_says_what_a_curve_needs(tmp_path: Path) -> None:
    run(tmp_path)
    first, *_, last = read_history(tmp_path / HISTORY_FILE)
    assert {"step", "images", "seconds", "learning_rate", "loss", "gradient_norm", "cross_entropy"} <= set(first)
    assert (first["step"], first["images"], last["step"], last["images"]) == (1, 10, 8, 80)
    assert 0 < first["learning_rate"] < LOOP.learning_rate
    assert first["loss"] == first["cross_entropy"]


def test_seconds_are_summed_over_the_legs_and_a_finished_run_adds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later than the one before; between legs a day passes."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("time.monotonic", clock)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, die_at=4)
    cut = read_history(tmp_path / HISTORY_FILE)[-1]["seconds"]
    now[0] += 86400
    ended = run(tmp_path)
    seconds = [row["seconds"] for row in read_history(tmp_path / HISTORY_FILE)]
    assert seconds == sorted(seconds)
    assert cut in seconds
    assert cut < seconds[-1] <= ended.seconds < 86400
    again = run(tmp_path)
    assert (again.steps, again.images) == (ended.steps, ended.images) == (8, 80)
    assert again.seconds <= ended.seconds
    assert [row["seconds"] for row in read_history(tmp_path / HISTORY_FILE)] == seconds


@pytest.mark.parametrize("broken", ["no json\n", "[1]\n", '{"loss": 1}\n', '{"step": null}\n'])
def test_a_foreign_file_is_refused_in_one_line(broken: str, tmp_path: Path) -> None:
    path = tmp_path / HISTORY_FILE
    path.write_text(json.dumps({"step": 1}) + "\n" + broken)
    with pytest.raises(InputError, match=r"history.jsonl:2: not a row.*delete the file") as error:
        History(tmp_path, 5)
    assert "\n" not in str(error.value)
    assert path.exists()
