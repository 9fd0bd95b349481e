"""The gradient of one step, computed part by part and averaged over all parts of all processes.

A batch is cut into equal parts. Each is computed on its own: with randomness derived from (seed, stage, step, part), starting from
the step's own buffers, with batch statistics of its own. Then gradients, buffers (batch-norm statistics), loss and metrics are
averaged, every part weighing as its share of the images. So it does not matter which process computes a part: n processes do
what one does in as many parts, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from amsdn.training.ahead import Source
from amsdn.training.ranks import Ranks
from amsdn.training.settings import LoopConfig
from amsdn.training.stage import Batch, Stage
from amsdn.utils.helpers import derive_seed, generator


@dataclass(frozen=True)
class Step:
    """One step of a run: its number from 0, its images int64 [B] by their place in the training split, and how far the run is."""

    number: int
    images: Tensor
    progress: float

    def pieces(self, parts: int) -> Sequence[Tensor]:
        """The images of each part."""
        return self.images.tensor_split(parts)


@dataclass
class Sums:
    """What parts of a step came to, each value weighted by its part's share of the step's images. Gradients lie in the weights."""

    loss: Tensor  # []
    buffers: Tensor  # [N] float64: how far the model's buffers moved
    metrics: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # of the images, those that knew the metric
    memories: list[dict[str, Tensor]] = field(default_factory=list)

    def average(self, ranks: Ranks) -> dict[str, float]:
        """The metrics of all processes, each averaged over the images that knew it. Waits for the device."""
        gathered = ranks.gather({name: (float(value), self.shares[name]) for name, value in self.metrics.items()})
        names = dict.fromkeys(name for known in gathered for name in known)
        known = {name: [theirs[name] for theirs in gathered if name in theirs] for name in names}
        return {name: sum(value for value, _ in pairs) / sum(share for _, share in pairs) for name, pairs in known.items()}


class PartedGradient:
    """Computes the gradient of a step of a stage in the weights' ``grad``: ``compute`` alone, then ``combine`` with the others."""

    def __init__(self, stage: Stage, model: nn.Module, extra: nn.Module, teacher: nn.Module, source: Source, config: LoopConfig) -> None:
        self.stage, self.model, self.teacher, self.source, self.config = stage, model, teacher, source, config
        self.parameters = [p for module in (model, extra) for p in module.parameters() if p.requires_grad]
        self.buffers = [b for module in (model, extra) for b in module.buffers()]
        self.device = next(model.parameters()).device

    def compute(self, step: Step, parts: int, mine: Sequence[int]) -> Sums:
        """The parts ``mine`` of ``parts``, one after the other. The buffers are as before, also where it raises."""
        self.clear()
        start = self._buffer_values()
        sums = Sums(torch.zeros((), device=self.device), torch.zeros_like(start))
        pieces = step.pieces(parts)
        try:
            for part in mine:
                share = len(pieces[part]) / len(step.images)
                self._add(sums, step, part, pieces[part], share)
                sums.buffers += share * _moved(start, self._buffer_values())
                self._set_buffers(start)
        except BaseException:
            self._set_buffers(start)
            self.clear()
            raise
        return sums

    def clear(self) -> None:
        """Forget the gradients, and free them."""
        for parameter in self.parameters:
            parameter.grad = None

    def used(self) -> list[int]:
        """1 for every weight that has a gradient, else 0. A weight without one is left alone by the optimizer, momentum and all."""
        return [int(p.grad is not None) for p in self.parameters]

    def combine(self, sums: Sums, used: Sequence[int], ranks: Ranks, *, equal: bool) -> None:
        """Add up what all processes computed, in place, and let the buffers move. ``used`` is what all agree upon, ``equal`` whether parts are."""
        if ranks.world > 1:
            self._add_up(sums, used, ranks)
            sums.memories = _gather_memories(sums.memories, equal, ranks)
        self._set_buffers(self._buffer_values() + sums.buffers)

    def _add(self, sums: Sums, step: Step, part: int, images: Tensor, share: float) -> None:
        self.model.train()
        batch = self._batch(step, part, images)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.mixed_precision):
            output = self.stage.step(self.model, self.teacher, batch)
        try:
            (output.loss * share).backward()
        finally:
            if output.after_backward is not None:
                output.after_backward()
        sums.loss += share * output.loss.detach()
        sums.memories.append(output.memory)
        for name, value in output.metrics.items():
            sums.metrics[name] = share * value + sums.metrics.get(name, 0.0)
            sums.shares[name] = share + sums.shares.get(name, 0.0)

    def _batch(self, step: Step, part: int, images: Tensor) -> Batch:
        seed, name = self.config.seed, self.stage.name
        x, y = self.source.fetch(images)
        torch.manual_seed(derive_seed(seed, name, "global", step.number, part))  # drop-path draws from it
        return Batch(
            x.to(self.device, memory_format=torch.channels_last, non_blocking=True),
            y.to(self.device, non_blocking=True),
            images.to(self.device, non_blocking=True),
            generator(self.device, seed, name, "step", step.number, part),
            generator("cpu", seed, name, "host", step.number),
            step.progress,
        )

    def _add_up(self, sums: Sums, used: Sequence[int], ranks: Ranks) -> None:
        together = [p for p, wanted in zip(self.parameters, used, strict=True) if wanted]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in together]
        flat = torch.cat([sums.loss.reshape(1), sums.buffers.float(), *(g.reshape(-1) for g in gradients)])
        ranks.add_up(flat)
        loss, buffers, *pieces = flat.split([1, len(sums.buffers), *(g.numel() for g in gradients)])
        sums.loss, sums.buffers = loss[0], buffers.double()
        for parameter, gradient, piece in zip(together, gradients, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))
            parameter.grad = gradient

    def _buffer_values(self) -> Tensor:
        """All buffers as one vector, exactly: float64 holds float32 and every count."""
        return torch.cat(
            [torch.zeros(0, dtype=torch.float64, device=self.device), *(b.detach().reshape(-1).double() for b in self.buffers)]
        )

    def _set_buffers(self, values: Tensor) -> None:
        with torch.no_grad():
            for buffer, value in zip(self.buffers, values.split([b.numel() for b in self.buffers]), strict=True):
                buffer.copy_((value if buffer.is_floating_point() else value.round()).view(buffer.shape))


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """The differences, 0 where nothing changed, be it infinite."""
    return torch.where(after == before, 0.0, after - before)


def _gather_memories(mine: list[dict[str, Tensor]], equal: bool, ranks: Ranks) -> list[dict[str, Tensor]]:
    """The memories of all parts, in order, from those of this process's. Parts of ``equal`` size never wait for the device."""
    if not mine[0]:
        return [{}] * (len(mine) * ranks.world)
    if equal:
        by_name = {name: ranks.gather_tensor(torch.stack([m[name] for m in mine])) for name in mine[0]}
        by_rank = [[{name: values[rank][i] for name, values in by_name.items()} for i in range(len(mine))] for rank in range(ranks.world)]
    else:
        by_rank = ranks.gather([{name: value.cpu() for name, value in m.items()} for m in mine])
        by_rank = [[{name: value.to(mine[0][name].device) for name, value in m.items()} for m in theirs] for theirs in by_rank]
    return list(chain.from_iterable(zip(*by_rank, strict=True)))  # part p is number p // world of process p mod world
