"""Who does what under torchrun. The store is a stand-in here; tests/e2e/test_torchrun.py has the real one."""

import threading

import pytest

from amsdn.commands import ranks
from amsdn.commands.ranks import Workers
from amsdn.errors import InputError
from amsdn.evaluation.shards import WHOLE, Shard


class Memory:
    """A store within this process that may break."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.broken = False

    def set(self, key: str, value: str) -> None:
        if self.broken:
            raise RuntimeError("Broken pipe\nand a long trace")
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        if self.broken:
            raise RuntimeError("Broken pipe\nand a long trace")
        return all(key in self.values for key in keys)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(Workers, "_join", lambda _: memory)
    monkeypatch.setattr(ranks, "POLL_S", 0.001)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return memory


def told(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_the_environment_says_who_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in ({}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "3"}):
        told(monkeypatch, **alone)
        assert Workers.of_environment() == Workers(0, 1)
    told(monkeypatch, RANK="2", WORLD_SIZE="3")
    assert Workers.of_environment() == Workers(2, 3)
    for nonsense in (
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "x"},
    ):
        told(monkeypatch, **nonsense)
        with pytest.raises(InputError, match="as torchrun does"):
            Workers.of_environment()


def test_alone_one_does_what_was_asked() -> None:
    assert list(Workers().shards(WHOLE)) == [WHOLE]
    assert list(Workers().shards(Shard(2, 3))) == [Shard(2, 3)]


def test_the_first_gathers_when_all_are_done(store: Memory) -> None:
    done: list[Shard] = []
    first = Workers(0, 3).shards(WHOLE)
    assert next(first) == Shard(1, 3)
    waiting = threading.Thread(target=lambda: done.extend(first))
    waiting.start()
    for rank in (2, 1):
        assert not done
        parts = Workers(rank, 3).shards(WHOLE)
        assert next(parts) == Shard(rank + 1, 3)
        waiting.join(0.05)
        assert waiting.is_alive()  # this one is still at work
        assert list(parts) == []
    waiting.join(10)
    assert done == [WHOLE]


def test_a_part_that_fails_is_never_done(store: Memory) -> None:
    parts = Workers(1, 2).shards(WHOLE)
    next(parts)
    with pytest.raises(ZeroDivisionError):
        parts.throw(ZeroDivisionError)  # type: ignore[attr-defined]
    assert store.values == {}


def test_what_was_done_before_a_restart_does_not_count(store: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(Workers(1, 2).shards(WHOLE)) == [Shard(2, 2)]
    before = set(store.values)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert list(Workers(1, 2).shards(WHOLE)) == [Shard(2, 2)]
    assert len(store.values) == 2
    assert before < set(store.values)


def test_parts_of_parts_are_refused_before_anything_is_done() -> None:
    with pytest.raises(InputError, match=r"--shard 1/2: torchrun divides the work among its 4 processes already"):
        Workers(3, 4).shards(Shard(1, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_one_clear_line(store: Memory, rank: int) -> None:
    parts = Workers(rank, 2).shards(WHOLE)
    next(parts)
    store.broken = True
    with pytest.raises(InputError, match="cannot be reached any more; start the same command again") as caught:
        next(parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("address", "port"), [(None, "29500"), ("127.0.0.1", None), ("127.0.0.1", "no port"), ("127.0.0.1", "70000")])
def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch, address: str | None, port: str | None) -> None:
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"process 1 of 2 cannot join the others \(.*\); start them all with torchrun"):
        next(Workers(1, 2).shards(WHOLE))
