"""The one training loop. A stage is a configuration, a step and its loss; everything else happens here.

Each step's data order and randomness are functions of (seed, stage, step), so a run that was killed at any
moment and started again ends with the weights of an undisturbed run, bit for bit on one CPU.
"""

import contextlib
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from amsdn.data import Split
from amsdn.errors import InputError
from amsdn.records import config_hash
from amsdn.training.checkpoint import load_state, save_state
from amsdn.training.ema import EMA
from amsdn.utils.helpers import derive_seed, generator


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to learn. The schedule is a linear warm-up, then a cosine to zero."""

    epochs: float = 10.0
    batch_size: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05  # matrices and filters only, never norms and biases
    warmup: float = 0.1  # share of the steps
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    mixed_precision: bool = True  # bfloat16 autocast around a step; weights, image perturbations and losses stay float32
    seed: int = 0
    checkpoint_every_s: float = 30.0
    log_every: int = 20  # steps

    def __post_init__(self) -> None:
        sound = {
            "epochs": 0 < self.epochs < math.inf,
            "batch_size": self.batch_size >= 2,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "warmup": 0 <= self.warmup < 1,
            "clip_norm": self.clip_norm > 0,
            "ema_decay": 0 <= self.ema_decay < 1,
            "log_every": self.log_every >= 1,
        }
        for name, fine in sound.items():
            if not fine:
                raise InputError(f"loop.{name} cannot be {getattr(self, name)}; see its default in the recipe")


@dataclass
class Batch:
    """One step's input: images [B,3,H,W], labels [B], and the step's own randomness."""

    x: Tensor
    y: Tensor
    generator: torch.Generator
    progress: float  # share of the run that is done, [0,1)


@dataclass
class StepOutput:
    """A scalar loss to descend, and numbers [] to log (detached tensors)."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Stage(ABC):
    """What a training stage adds to the loop."""

    name: str

    @abstractmethod
    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        """The loss of one batch. ``model`` is in train mode; ``teacher`` is its average, in eval mode."""

    def extra_modules(self) -> nn.ModuleDict:
        """Modules trained along with the model and thrown away afterwards."""
        return nn.ModuleDict()

    def state(self) -> dict[str, Any]:
        """What the stage remembers from step to step, as tensors and plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""
        assert not state, f"stage {self.name} does not remember {list(state)}"


class TrainingDiverged(RuntimeError):
    """A loss or gradient stopped being finite."""


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived; the state has been saved. ``signal_number`` says which."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def train(stage: Stage, model: nn.Module, split: Split, config: LoopConfig, folder: Path, *, settings: Any = None) -> nn.Module:
    """Train ``model`` in place on ``split``, resuming from ``folder`` if a run was cut short there.

    Returns the averaged model in eval mode. ``settings`` is whatever else shapes the result; a state made
    under other settings is refused. Raises TrainingDiverged, Interrupted, and InputError for unusable input.
    """
    run = _Run(stage, model, split, config, folder, config_hash(stage.name, _plain(config), settings, len(split)))
    with _watch_signals() as caught, SummaryWriter(str(folder), purge_step=run.step, flush_secs=10) as board, run.bar() as bar:
        for batch in run.batches():
            output = run.update(batch)
            run.log(output, board, bar)
            if caught:
                run.save()
                raise Interrupted(
                    f"{stage.name}: stopped by {signal.Signals(caught[0]).name} after step {run.step} of {run.total}; "
                    f"start the same command again to go on",
                    caught[0],
                )
            run.save_if_due()
        run.save()
    return run.ema.model


class _Run:
    """The state of one call of ``train``."""

    def __init__(self, stage: Stage, model: nn.Module, split: Split, config: LoopConfig, folder: Path, settings_hash: str) -> None:
        if len(split) < 2:
            raise InputError(f"{stage.name}: nothing to train on with {len(split)} images; give at least 2")
        self.stage, self.split, self.config = stage, split, config
        self.model = model.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs alike
        self.folder, self.settings_hash = folder, settings_hash
        self.device = next(model.parameters()).device
        self.extra = stage.extra_modules().to(self.device)
        self.batch_size = min(config.batch_size, len(split))
        self.steps_per_epoch = len(split) // self.batch_size
        self.total = max(1, round(config.epochs * self.steps_per_epoch))
        torch.manual_seed(derive_seed(config.seed, stage.name, "init"))
        self.ema = EMA(model, config.ema_decay)
        self.optimizer = _make_optimizer(config, [model, self.extra])
        self.step, self.saved_at = 0, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def batches(self) -> Iterator[Batch]:
        """The batches that remain, each the same as in an undisturbed run."""
        order, order_epoch = torch.empty(0), -1
        while self.step < self.total:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            if epoch != order_epoch:
                shuffle = generator("cpu", self.config.seed, self.stage.name, "order", epoch)
                order, order_epoch = torch.randperm(len(self.split), generator=shuffle), epoch
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            x, y = self.split.fetch(chosen)
            gen = generator(self.device, self.config.seed, self.stage.name, "step", self.step)
            torch.manual_seed(derive_seed(self.config.seed, self.stage.name, "global", self.step))  # drop-path draws from it
            x = x.to(self.device, memory_format=torch.channels_last)
            yield Batch(x, y.to(self.device), gen, self.step / self.total)

    def update(self, batch: Batch) -> StepOutput:
        """One optimisation step; raises TrainingDiverged before the weights are touched."""
        self._set_learning_rate()
        self.model.train()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.mixed_precision):
            output = self.stage.step(self.model, self.ema.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        if not torch.isfinite(output.loss + norm):
            raise TrainingDiverged(self._what_diverged(output, norm))
        output.metrics |= {"loss": output.loss.detach(), "gradient_norm": norm}
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        return output

    def log(self, output: StepOutput, board: SummaryWriter, bar: tqdm) -> None:
        bar.update(1)
        if self.step % self.config.log_every and self.step != self.total:
            return
        values = {name: float(v) for name, v in output.metrics.items()}
        bar.set_postfix({k: f"{v:.3f}" for k, v in values.items() if k == "loss" or k.startswith("accuracy")}, refresh=False)
        for name, value in values.items():
            board.add_scalar(f"{self.stage.name}/{name}", value, self.step)
        board.add_scalar(f"{self.stage.name}/learning_rate", self.optimizer.param_groups[0]["lr"], self.step)

    def bar(self) -> tqdm:
        return tqdm(total=self.total, initial=self.step, desc=f"{self.stage.name:>9}", unit="step", dynamic_ncols=True, mininterval=0.5)

    def save_if_due(self) -> None:
        if time.monotonic() - self.saved_at >= self.config.checkpoint_every_s:
            self.save()

    def save(self) -> None:
        """Write the state; raises TrainingDiverged rather than keep weights that are not finite."""
        broken = [name for name, value in self.model.state_dict().items() if not bool(value.isfinite().all())]
        if broken:
            raise TrainingDiverged(
                f"{self.stage.name}: weights not finite after step {self.step} of {self.total}: {', '.join(broken[:3])}; "
                "lower the learning rate, with another --out"
            )
        state = {
            "settings": self.settings_hash,
            "step": self.step,
            "model": self.model.state_dict(),
            "extra": self.extra.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage.state(),
        }
        save_state(self.folder, state)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        state = load_state(self.folder, self.settings_hash)
        if state is None:
            return
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.extra.load_state_dict(state["extra"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage.load(state["stage"])

    def _set_learning_rate(self) -> None:
        rate = self.config.learning_rate * schedule(self.step / self.total, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _what_diverged(self, output: StepOutput, norm: Tensor) -> str:
        culprits = [name for name, v in output.metrics.items() if not math.isfinite(float(v))]
        loss = float(output.loss.detach())
        if not culprits:
            culprits = ["the gradient"] if math.isfinite(loss) else ["the loss"]
        return (
            f"{self.stage.name}: not finite at step {self.step + 1} of {self.total}: {', '.join(culprits)} "
            f"(loss {loss:g}, gradient norm {float(norm):g}); lower the learning rate or turn mixed precision off, with another --out"
        )


def schedule(progress: float, warmup: float) -> float:
    """The share of the peak learning rate at ``progress`` in [0,1): linear up over ``warmup``, then a half cosine to zero."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _make_optimizer(config: LoopConfig, modules: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


@contextlib.contextmanager
def _watch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying from them; a second SIGINT dies at once."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals cannot be handled here
        previous = {}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _plain(config: LoopConfig) -> dict[str, Any]:
    """The settings that shape the result: not how often it is saved or logged."""
    return {k: v for k, v in vars(config).items() if k not in ("checkpoint_every_s", "log_every")}
