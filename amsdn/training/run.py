"""The state of a training run in one process: what ``train`` moves from step to step, keeps on disk and takes up again."""

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from amsdn.checks import Checks
from amsdn.data import Split
from amsdn.errors import InputError
from amsdn.training.ahead import ReadAhead
from amsdn.training.checkpoint import load_state, save_state, weights_digest
from amsdn.training.divergence import FiniteWatch, TrainingDiverged
from amsdn.training.ema import EMA
from amsdn.training.history import Journal
from amsdn.training.memory import unless_out_of_memory
from amsdn.training.parts import PartedGradient, Step, Sums
from amsdn.training.ranks import Ranks
from amsdn.training.settings import SMALLEST_PART, LoopConfig, make_optimizer, schedule
from amsdn.training.stage import Stage
from amsdn.utils.helpers import derive_seed, generator


class Wishes(NamedTuple):
    """What a process would have all of them do after this step."""

    stop_signal: int  # the number of the signal that arrived here; 0 for none
    save: bool


class Run:
    """Weights, average, optimizer and position of a run, the same in every one of ``ranks``. Raises InputError as ``train`` does."""

    def __init__(
        self, stage: Stage, model: nn.Module, split: Split, config: LoopConfig, folder: Path, settings_hash: str, ranks: Ranks
    ) -> None:
        if len(split) < SMALLEST_PART:
            raise InputError(f"{stage.name}: nothing to train on with {len(split)} images; give at least {SMALLEST_PART}")
        self.stage, self.split, self.config, self.ranks = stage, split, config, ranks
        self.model = model.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs alike
        self.folder, self.settings_hash = folder, settings_hash
        self.device = next(model.parameters()).device
        self.extra = stage.extra_modules().to(self.device)
        self.batch_size = min(config.batch_size, len(split))
        self.steps_per_epoch = len(split) // self.batch_size
        self.total = max(1, round(config.epochs * self.steps_per_epoch))
        torch.manual_seed(derive_seed(config.seed, stage.name, "init"))
        self.ema = EMA(model, config.ema_decay)
        if config.compile:
            compile_backbones(self.model, self.ema.model)
        self.source = ReadAhead(split, self.device)
        self.parted = PartedGradient(stage, self.model, self.extra, self.ema.model, self.source, config)
        self.optimizer = make_optimizer(config, self.parted.parameters)
        self.checks, self.watch = Checks(), FiniteWatch(stage.name, self.total, ranks)
        self.orders: dict[int, Tensor] = {}
        self.step, self.parts, self.seconds_before = 0, config.parts, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self._meet()
        self._fit_parts()
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.started_at = time.monotonic()

    def steps(self) -> Iterator[Step]:
        """The steps that remain, each the same as in an undisturbed run."""
        while self.step < self.total:
            yield Step(self.step, self._images(self.step), self.step / self.total)

    def _images(self, number: int) -> Tensor:
        """Which images step ``number`` sees, int64 [B]: all of an epoch in an order of its own, batch by batch. None after the last step."""
        if number >= self.total:
            return torch.empty(0, dtype=torch.int64)
        epoch, position = divmod(number, self.steps_per_epoch)
        if epoch not in self.orders:
            shuffle = generator("cpu", self.config.seed, self.stage.name, "order", epoch)
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = torch.randperm(len(self.split), generator=shuffle)
        return self.orders[epoch][position * self.batch_size : (position + 1) * self.batch_size]

    def gradient(self, step: Step, signals: Sequence[int]) -> tuple[Sums, Wishes]:
        """The step's gradient in the weights' ``grad``, in as many parts as memory asks for, and the wishes of all processes.

        ``signals`` are those that arrived here; it may grow while the step is computed.
        """
        following = Step(step.number + 1, self._images(step.number + 1), 0.0)
        while True:
            mine = self.ranks.mine(self.parts)
            self.source.announce(*([s.pieces(self.parts)[part] for part in mine] for s in (step, following)))
            with self.checks.collecting():
                sums = unless_out_of_memory(partial(self.parted.compute, step, self.parts, mine))
            wishes = Wishes(signals[0] if signals else 0, self.save_is_due())
            out_of_memory, stop_signal, save, *used = self.ranks.agree([sums is None, *wishes, *self.parted.used()])
            if sums is not None and not out_of_memory:
                self.parted.combine(sums, used, self.ranks, equal=self.batch_size % self.parts == 0)
                return sums, Wishes(stop_signal, bool(save))
            del sums
            self._cut_smaller()

    def update(self, sums: Sums) -> Tensor:
        """One optimisation step; returns the gradient's norm [].

        On the CPU raises TrainingDiverged and what the step's own checks complain of (ThreatViolation, InputError) before the
        weights are touched; on CUDA, which would have to be waited for, before the next row is logged or state saved.
        """
        rate = self.config.learning_rate * schedule(self.step / self.total, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.parted.parameters, self.config.clip_norm)
        self.watch.note(self.step + 1, sums.loss, norm, sums.metrics)
        if self.device.type == "cpu":
            self._look()
        self.optimizer.step()
        self.ema.update(self.model)
        self.stage.remember(sums.memories)
        self.step += 1
        return norm

    def log(self, sums: Sums, norm: Tensor, journal: Journal) -> None:
        """Every ``log_every`` steps and at the end, a row of what the step came to in all processes."""
        journal.bar.update(1)
        if self.step % self.config.log_every and self.step != self.total:
            return
        self._look()
        row = {"step": self.step, "images": self.step * self.batch_size, "seconds": round(self.seconds(), 3)}
        row |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "loss": float(sums.loss), "gradient_norm": float(norm)}
        journal.log(row | sums.average(self.ranks))

    def close(self) -> None:
        """Stop what runs beside the steps."""
        self.source.close()

    def seconds(self) -> float:
        """Of training until now: this leg and those before it."""
        return self.seconds_before + (time.monotonic() - self.started_at if self.step > self.resumed_at else 0.0)

    def save_is_due(self) -> bool:
        """Whether it is time again to keep the state; the first process's clock counts."""
        return self.ranks.first and time.monotonic() - self.saved_at >= self.config.checkpoint_every_s

    def save(self, journal: Journal) -> None:
        """Keep the state, unless it is kept already; raises TrainingDiverged rather than keep weights that are not finite."""
        if self.step == self.saved_step:
            return
        self._look()
        self._refuse_broken_weights()
        if self.ranks.first:
            journal.sync()
            save_state(self.folder, self._state())
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _look(self) -> None:
        """Make the checks that were put off; the device is waited for."""
        self.checks.look()
        self.watch.check()

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self.settings_hash,
            "step": self.step,
            "parts": self.parts,
            "seconds": self.seconds(),
            "model": self.model.state_dict(),
            "extra": self.extra.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage.state(),
        }

    def _resume(self) -> None:
        state = load_state(self.folder, self.settings_hash)
        if state is not None:
            self.step, self.parts, self.seconds_before = state["step"], state["parts"], state["seconds"]
            self.model.load_state_dict(state["model"])
            self.extra.load_state_dict(state["extra"])
            self.ema.model.load_state_dict(state["ema"])
            self.ema.updates = state["ema_updates"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.stage.load(state["stage"])
        self.resumed_at = self.step

    def _meet(self) -> None:
        """Nobody trains before all processes are about to do the same. Raises InputError, saying what differs."""
        if self.ranks.world == 1:
            return
        settings, steps, weights = zip(
            *self.ranks.gather((self.settings_hash, self.step, weights_digest(self.model, self.extra))), strict=True
        )
        if len(set(settings)) > 1:
            raise InputError(f"{self.stage.name}: processes were given different settings or data; start all with the same command")
        if len(set(steps)) > 1:
            raise InputError(
                f"{self.folder}: processes see different states (after steps {sorted(set(steps))}); put --out where all see it"
            )
        if len(set(weights)) > 1:
            raise InputError(f"{self.stage.name}: processes start from different weights; give all the same --init and versions")

    def _fit_parts(self) -> None:
        """A batch has at least as many parts as there are processes, and each process as many as any other."""
        world, wanted = self.ranks.world, self.parts
        self.parts = world * -(-wanted // world)
        if self.batch_size < SMALLEST_PART * self.parts:
            raise InputError(
                f"{self.stage.name}: {self.batch_size} images a step cannot be cut into {self.parts} parts of at least {SMALLEST_PART} "
                f"for {world} process{'es' * (world > 1)}; use a larger loop.batch_size, fewer processes or parts"
            )
        if self.parts > wanted:
            self._say(f"{world} processes compute {self.batch_size} images a step in {self.parts} parts")

    def _cut_smaller(self) -> None:
        """Twice as many parts from here on; raises InputError where a part would be too small."""
        before, self.parts = -(-self.batch_size // self.parts), 2 * self.parts
        if self.batch_size < SMALLEST_PART * self.parts:
            raise InputError(
                f"{self.stage.name}: out of memory at {before} images at once, and fewer make no batch; "
                "use a smaller model or image size, or a device with more memory"
            )
        self._say(
            f"out of memory at {before} images at once: going on with {self.parts} parts of {-(-self.batch_size // self.parts)}, "
            f"the same {self.batch_size} images a step"
        )

    def _say(self, message: str) -> None:
        if self.ranks.first:
            tqdm.write(f"{self.stage.name}: {message}", file=sys.stderr)

    def _refuse_broken_weights(self) -> None:
        state = self.model.state_dict()
        if bool(torch.stack([value.isfinite().all() for value in state.values()]).all()):  # one wait for the device, not one a tensor
            return
        broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
        raise TrainingDiverged(
            f"{self.stage.name}: weights not finite after step {self.step} of {self.total}: {', '.join(broken[:3])}; "
            "lower the learning rate, with another --out"
        )


def compile_backbones(*models: nn.Module) -> None:
    """Compile in place what costs most in each model: its ``backbone``, or all of it. Names of weights stay as they are.

    Attacks and the step itself see different modes, batch sizes and gradients wanted, so several variants are compiled.
    """
    for model in models:
        getattr(model, "backbone", model).compile()
