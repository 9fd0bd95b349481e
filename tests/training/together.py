"""Several processes that train together, cheap to start: torch is imported once, by a server that every process is forked from."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amsdn.data import ArraySplit
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["amsdn.training.pretrain_ssrt", "amsdn.training.finetune_attacks", "amsdn.training.loop"])
LOOP = LoopConfig(epochs=2, batch_size=10, learning_rate=1e-2, mixed_precision=False, checkpoint_every_s=0, log_every=2)


def run_together(target: Callable[..., None], world: int, *arguments: Any) -> list[int | None]:
    """Call ``target(*arguments)`` in ``world`` processes with torchrun's environment; their exit codes, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [SERVER.Process(target=_enter, args=(target, rank, world, port, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


def _enter(target: Callable[..., None], rank: int, world: int, port: int, arguments: Sequence[Any]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    target(*arguments)


def forty_images() -> ArraySplit:
    """Forty 16x16 images of two classes: dark and bright."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = (torch.rand(40, 3, 16, 16, generator=gen) * 100 + 120 * labels.reshape(-1, 1, 1, 1)).to(torch.uint8)
    return ArraySplit(images, labels)


class Net(nn.Module):
    """Batch statistics, dropout, a weight that only some parts use and one that none does.

    No bias before the batch norm: its gradient is zero but for rounding, which AdamW would make as large as any other.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2))
        self.sometimes = nn.Parameter(torch.ones(2, 2))
        self.never = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Probe(Stage):
    """Cross-entropy with every source of randomness; remembers the images of every part, and notes every step it makes."""

    name = "probe"

    def __init__(self, before: Callable[[int, Batch], None] = lambda step, batch: None) -> None:
        self.before, self.remembered, self.seen = before, [], []

    def state(self) -> dict[str, Any]:
        return {"remembered": self.remembered}

    def load(self, state: dict[str, Any]) -> None:
        self.remembered = state["remembered"]

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        assert isinstance(model, Net)
        self.seen.append(batch.index)
        self.before(len(self.remembered), batch)
        noise = torch.randn(batch.x.shape, generator=batch.generator) + torch.randn(batch.x.shape)
        logits = model(batch.x + 0.01 * noise) + 0.1 * teacher(batch.x)
        if batch.index[0] % 2:
            logits = logits @ model.sometimes
        loss = nn.functional.cross_entropy(logits, batch.y)
        choice = torch.rand((), generator=batch.host)
        metrics = {"cross_entropy": loss.detach(), "even" if batch.index[0] % 2 == 0 else "odd": batch.index[0].float()}
        return StepOutput(loss, metrics, {"index": batch.index, "choice": choice})

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        assert len({float(m["choice"]) for m in memories}) == 1, "a choice of the host differs among the parts of a step"
        self.remembered = [*self.remembered, [m["index"].clone() for m in memories]]


def outcome(trained: Any, model: nn.Module, stage: Probe) -> dict[str, Any]:
    """What must be the same, as tensors."""
    return {"average": trained.model.state_dict(), "weights": model.state_dict(), "remembered": stage.remembered, "seen": stage.seen}


def keep(folder: Path, name: str, value: Any) -> None:
    """Hand a value of this process to the test."""
    torch.save(value, folder / f"{name}-{os.environ['RANK']}.pt")


def kept(folder: Path, name: str, rank: int) -> Any:
    """The value that a process handed over."""
    return torch.load(folder / f"{name}-{rank}.pt")
