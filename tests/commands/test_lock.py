"""A folder has one writer at a time, whoever dies how."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amsdn.commands.lock import LOCK_FILE, only_writer
from amsdn.errors import InputError

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from amsdn.commands.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ROOT = Path(__file__).parents[2]


def holder(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_in_one_line_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "train"
    with only_writer(folder):
        refusal = pytest.raises(InputError, match=r"train/\.lock: another process is writing to this folder; wait for it")
        with refusal as error, only_writer(folder, patience_s=0):
            raise AssertionError("two writers")
        assert "\n" not in str(error.value)
        assert (folder / LOCK_FILE).exists()
        (folder / "result").touch()
    assert [p.name for p in folder.iterdir()] == ["result"]
    with only_writer(folder, patience_s=0):
        pass


def test_a_folder_to_which_nothing_was_written_is_gone_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), only_writer(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    with only_writer(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_a_lock_is_released_by_sigkill_and_what_was_half_written_removed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(InputError, match="another process"), only_writer(tmp_path, patience_s=0):
            pass
        (tmp_path / "model").mkdir()
        torn = [tmp_path / ".state.pt.7.partial", tmp_path / "model" / ".weights.7.partial"]
        for path in torn:
            path.touch()
        process.send_signal(signal.SIGKILL)
        with only_writer(tmp_path):  # without waiting for its end
            assert not any(path.exists() for path in torn)
            assert (tmp_path / "model").is_dir()


def test_a_writer_waits_for_one_that_is_about_to_end(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        began = time.monotonic()
        with subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {process.pid}"]), only_writer(tmp_path, patience_s=20):
            assert time.monotonic() - began >= 0.25


def test_a_lock_file_removed_by_its_last_holder_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its holder may remove it and a third process make it anew."""
    from amsdn.commands import lock

    locked, calls = lock._locked, []

    def late(descriptor: int) -> bool:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
            (tmp_path / LOCK_FILE).touch()
        calls.append(descriptor)
        return locked(descriptor)

    monkeypatch.setattr(lock, "_locked", late)
    with only_writer(tmp_path), pytest.raises(InputError, match="another process"), only_writer(tmp_path, patience_s=0):
        raise AssertionError("two writers")
    assert len(calls) == 3
