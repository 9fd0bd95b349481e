"""Dividing a measurement among the processes that ``torchrun`` starts: each does its shard, the first then gathers.

``torchrun --nproc-per-node 4 -m amsdn evaluate ...`` needs a run folder that all of them see, and nothing else of one another: no process
waits but the first, which must know when the others are done. It learns that from the store that torchrun keeps for its processes.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from amsdn.errors import InputError
from amsdn.evaluation.shards import WHOLE, Shard

JOINING = timedelta(minutes=10)  # how far apart the processes may start
POLL_S = 0.2


class Store(Protocol):
    """What is used here of ``torch.Store``."""

    def set(self, key: str, value: str, /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True)
class Workers:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> "Workers":
        """As RANK and WORLD_SIZE say; raises InputError where they make no sense. Alone where WORLD_SIZE is 1 or not set."""
        rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
        if count == "1":
            return cls()
        if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
            raise InputError(f"RANK={rank}, WORLD_SIZE={count}: set both as torchrun does, with RANK from 0 to WORLD_SIZE - 1, or neither")
        return cls(int(rank), int(count))

    @classmethod
    def refuse(cls) -> None:
        """Raise InputError if there are several processes: for a command without parts to give them, which would write the same files."""
        if (count := cls.of_environment().count) > 1:
            raise InputError(f"works in one process and was started in {count}; start it without torchrun")

    @property
    def first(self) -> bool:
        """Whether this is the process that gathers and speaks."""
        return self.rank == 0

    def shards(self, asked: Shard) -> Iterator[Shard]:
        """What this process must do, one after the other: ``asked`` where it is alone; else its own part, and the first then the whole.

        The whole comes once every process has finished its part. Raises InputError where parts of parts are asked for, and, as the
        first part is taken, where the others cannot be reached.
        """
        if self.count > 1 and not asked.whole:
            raise InputError(
                f"--shard {asked}: torchrun divides the work among its {self.count} processes already; leave out one of the two"
            )
        return iter([asked]) if self.count == 1 else self._turns()

    def _turns(self) -> Iterator[Shard]:
        store = self._join()
        yield Shard(self.rank + 1, self.count)
        with _in_touch():
            store.set(_done(self.rank), "")
            if self.first:
                self._wait(store)
        if self.first:
            yield WHOLE

    def _join(self) -> Store:
        """The store that the processes share; before the work, so that a wrong address does not cost it."""
        try:
            from torch.distributed.rendezvous import rendezvous  # not in every build of torch

            store: Store = next(rendezvous("env://", self.rank, self.count, timeout=JOINING))[0]
        except (RuntimeError, ValueError, ImportError) as e:  # DistNetworkError and DistStoreError are RuntimeErrors
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise InputError(f"process {self.rank} of {self.count} cannot join the others ({reason}); start them all with torchrun") from e
        return store

    def _wait(self, store: Store) -> None:
        """Return once every process is done, however long that takes; torchrun ends this one where another dies."""
        all_done = [_done(rank) for rank in range(self.count)]
        if not store.check(all_done):
            print("waiting for the other processes", file=sys.stderr, flush=True)
        while not store.check(all_done):
            time.sleep(POLL_S)


@contextlib.contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # of the store: torchrun itself, or the process that keeps the store, is gone
        raise InputError("the other processes cannot be reached any more; start the same command again to go on") from e


def _done(rank: int) -> str:
    """The key that says that a process has done its part; another one each time that torchrun starts them all again."""
    return f"amsdn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/done/{rank}"
