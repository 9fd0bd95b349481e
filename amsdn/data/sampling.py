"""Which samples, and in what order: stratified shuffles, held-out sets, batches."""

from collections.abc import Iterator, Sized

import torch
from torch import Tensor

from amsdn.errors import InputError
from amsdn.utils.helpers import generator as seeded_generator

MAX_HELD_OUT = 2000  # enough to calibrate a 5 % false-positive rate to within a point
HELD_OUT_SHARE = 25  # one training image in this many


def occurrence(labels: Tensor) -> Tensor:
    """labels [N] int64 -> for each sample, how many earlier samples share its label, [N] int64."""
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels), device=labels.device) - starts[labels[by_class]]
    return rank


def balanced_first(labels: Tensor, n: int) -> Tensor:
    """The indices, ascending, of at most ``n`` samples with class counts as equal as the labels [N] allow.

    Every class gives its first sample before any gives its second, so a smaller choice is part of a larger one.
    """
    return occurrence(labels).argsort(stable=True)[:n].sort().values


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of labels [N] (on the CPU) in which every run of samples has near the class shares of the whole."""
    shuffled = torch.randperm(len(labels), generator=generator)
    mixed = labels[shuffled]
    # The r-th of a class's n samples belongs at the fraction (r + 1/2) / n of the order.
    position = (occurrence(mixed).double() + 0.5) / torch.bincount(mixed)[mixed]
    return shuffled[position.argsort(stable=True)]


def held_out_size(n: int, where: str) -> int:
    """How many of ``n`` training images become the validation set. Raises InputError if there are fewer than two."""
    if n < 2:
        raise InputError(f"{where}: {n} training image(s), and one has to be held out for calibration; add training images")
    return min(MAX_HELD_OUT, max(1, n // HELD_OUT_SHARE))


def hold_out(labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Stratified (train, val) indices, each ascending; the same ones whenever the labels [N] are the same."""
    size = held_out_size(len(labels), where)
    order = stratified_order(labels, seeded_generator("cpu", "amsdn held-out split"))
    return order[size:].sort().values, order[:size].sort().values


def batches(split: Sized, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Index tensors int64 [<= batch_size] that cover ``split`` once, shuffled when a generator is given.

    The last batch may be short. The order is drawn at the call, so the generator's state before it decides the epoch.
    """
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1, got {batch_size}")
    n = len(split)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator, device=generator.device)
    return iter(order.split(batch_size) if n else ())
