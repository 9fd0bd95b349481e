"""One writer per folder: a lock that the kernel releases, even on SIGKILL."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from amsdn.errors import InputError

try:
    import fcntl
except ImportError:  # no such locks on this system: nothing is guarded there
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def only_writer(folder: Path, patience_s: float = 3.0) -> Iterator[None]:
    """Hold ``folder`` alone; made where missing, and removed again if nothing was written to it.

    A process that was just killed may need a moment to vanish, hence the patience. Temporary files that a killed process left
    half-written are removed. Raises InputError where another process holds the folder; file systems without locks are not guarded.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = _acquire(path, patience_s)
    try:
        for torn in folder.rglob(".*.partial"):
            torn.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # it holds something by now
            for parent in created:
                parent.rmdir()


def _acquire(path: Path, patience_s: float) -> int:
    """A descriptor that locks the file now at ``path``; its last holder removes it, so the one that was locked may be gone."""
    deadline = time.monotonic() + patience_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if _locked(descriptor):
            if _still_there(path, descriptor):
                return descriptor
        elif time.monotonic() >= deadline:
            os.close(descriptor)
            raise InputError(f"{path}: another process is writing to this folder; wait for it, stop it, or use another --out")
        else:
            time.sleep(0.1)
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
