"""Checks of values that lie on the device: made at once, or put off and made together.

To look at a value on a GPU is to wait for everything that leads to it. A training step cannot afford that, yet what it would have
found must not go unnoticed: the step collects its checks, and the loop looks at them when it waits for the device anyhow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Complaint = Callable[[], Exception]


class Checks:
    """Checks that were put off, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Complaint]] = []

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within, ``insist`` puts off its checks until ``look``; those of this thread alone."""
        token = _COLLECTOR.set(self)
        try:
            yield
        finally:
            _COLLECTOR.reset(token)

    def add(self, holds: Tensor, complaint: Complaint) -> None:
        """Put off a check. The complaint is kept until then, so it should hold on to small tensors only."""
        self._open.append((holds, complaint))

    def look(self) -> None:
        """Wait for the device once; raises the complaint of the first check that does not hold. All are made and forgotten."""
        done, self._open = self._open, []
        if not done:
            return
        holds = torch.stack([flag.to(done[0][0].device) for flag, _ in done]).tolist()
        if not all(holds):
            raise done[holds.index(False)][1]()


_COLLECTOR: ContextVar[Checks | None] = ContextVar("amsdn_checks", default=None)


def insist(holds: Tensor, complaint: Complaint) -> None:
    """Raise ``complaint()`` unless ``holds``, a bool tensor [], is true: now, or later where checks are being collected."""
    collector = _COLLECTOR.get()
    if collector is not None:
        collector.add(holds, complaint)
    elif not bool(holds):
        raise complaint()
