"""The processes that train together, on one machine or on many, as ``torchrun`` starts them.

We do not wrap the model in DistributedDataParallel. A training step makes many forward passes of several methods (attacks, the
trace, the teacher) that its wrapper does not see; running out of memory in one process must be agreed upon by all before
anybody moves; and batch-norm statistics have to be averaged along with the gradients. So each process computes its parts of the
batch alone, without a word, and then all talk twice:

1. ``agree``: a few small whole numbers, on the CPU over gloo, whatever the device. Hosts learn here whether memory ran out
   somewhere or a signal asks to stop, without waiting for a GPU; and here a process that died is noticed, since gloo reports a
   closed connection where NCCL would wait.
2. ``add_up``: gradients, statistics and the loss as one flat tensor, on the device. What DDP hides by overlapping this with the
   backward pass is little: an adversarial step computes for 5 to 25 forward passes before it.

The sums are the same in every process bit for bit (each element is added up in one place and then sent around), so weights and
optimizer states stay the same without being sent.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from amsdn.errors import InputError

PATIENCE = datetime.timedelta(minutes=30)  # how long a process waits for one that is alive but busy, as at the end of a stage
ROLL_CALL_S = 3.0  # how long those who are left wait for each other's sign of life


class ProcessGone(RuntimeError):
    """Another process of the run has ended; what was saved last is whole."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: number ``rank`` of ``world``, counted from 0. Every method is called by all."""

    rank: int = 0
    world: int = 1
    store: Any = field(default=None, repr=False, compare=False)  # the key-value store through which the processes met

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress for all."""
        return self.rank == 0

    def mine(self, parts: int) -> range:
        """The parts of a batch that this process computes: part p is computed by process p mod world."""
        return range(self.rank, parts, self.world)

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Whole numbers, each the greatest that any process gives. Raises ProcessGone."""
        if self.world == 1:
            return list(numbers)
        greatest = torch.tensor(numbers, dtype=torch.int64)
        with self._together():
            dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return greatest.tolist()

    def add_up(self, values: Tensor) -> None:
        """Replace a contiguous tensor by the sum of all processes' in its place. Raises ProcessGone."""
        if self.world > 1:
            with self._together():
                dist.all_reduce(values)

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every process, by rank; may wait for the device if it holds tensors. Raises ProcessGone."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def gather_tensor(self, value: Tensor) -> list[Tensor]:
        """A tensor of every process, by rank, all of one shape and type, left on the device. Raises ProcessGone."""
        if self.world == 1:
            return [value]
        values = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.world)]
        with self._together():
            dist.all_gather(values, value.contiguous())
        return values

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:  # gloo and NCCL raise it, or a subclass, when a connection breaks
            raise ProcessGone(
                f"{self._who_is_gone()}; start again, or use torchrun --max-restarts, to go on from the last checkpoint"
            ) from e

    def _who_is_gone(self) -> str:
        """Roll call through the store: whoever is left leaves its mark; first we hang up, so that nobody goes on waiting for us."""
        if dist.is_initialized():
            dist.destroy_process_group()
        unmarked = set(range(self.world))
        with contextlib.suppress(RuntimeError):  # the store's own host may be gone
            self.store.set(f"alive/{self.rank}", "yes")
            deadline = time.monotonic() + ROLL_CALL_S
            while len(unmarked) > 1 and time.monotonic() < deadline:
                unmarked = {r for r in range(self.world) if not self.store.check([f"alive/{r}"])}
                time.sleep(0.05)
        if not unmarked or len(unmarked) == self.world:
            return f"one of {self.world} processes is gone"
        missing = ", ".join(str(r) for r in sorted(unmarked))
        return f"process {missing} of {self.world} (counted from 0) is gone"


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, this one among them, as long as the block runs; ``ALONE`` outside of torchrun.

    ``device`` is where this process computes (``pick_device`` gives each its own GPU). Raises InputError where the environment
    that torchrun sets is incomplete.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    except (ValueError, dist.DistError) as e:
        raise InputError(f"several processes: they cannot meet ({' '.join(str(e).split())}); start them with torchrun") from e
    # torchrun may keep one store over its restarts: without a name of its own this start could read the last one's addresses, and wait for ever.
    store = dist.distributed_c10d.PrefixStore(f"amsdn/start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Small numbers travel over gloo in either case.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Ranks(rank, world, store)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
