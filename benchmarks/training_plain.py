"""The loop that a user would write with torchattacks, and what each thing that our loop does otherwise is worth.

One function, ``plain_loop``, with one switch for each difference. What torchattacks 3.5 does was read in its source: its PGD puts the
model into eval mode during the attack and back into train mode afterwards, takes the gradient of the images alone
(``torch.autograd.grad``, so no gradient of the weights is computed, though the forward pass keeps what it would need for one),
in the precision of its surroundings; it draws the start from the global generator.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from training_machine import Marks
from training_steps import PGD10, Steps, Way, fresh, images_per_second, kinds

from amsdn.attacks.adaptive import frozen
from amsdn.data import ArraySplit, Augment
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes import Recipe
from amsdn.training.loop import schedule
from amsdn.training.views import deployed
from amsdn.utils.helpers import derive_seed, generator

LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05


def installed() -> bool:
    """Whether torchattacks can be imported here."""
    return importlib.util.find_spec("torchattacks") is not None


@dataclass(frozen=True)
class Plain:
    """The user's loop, and what is changed in it."""

    on_device: bool = False  # images and augmentation on the device; else a DataLoader with torchvision's transforms
    channels_last: bool = False
    bf16: bool = False
    freeze: bool = False  # weights ask for no gradient while the attack runs
    ours: bool = False  # our PGD instead of torchattacks'


PLAIN = "the plain loop"
CHANGES = {
    PLAIN: Plain(),
    "data on the device": Plain(on_device=True),
    "channels last": Plain(channels_last=True),
    "bf16": Plain(bf16=True),
    "weights frozen in the attack": Plain(freeze=True),
    "our PGD": Plain(ours=True),
    "the first four": Plain(on_device=True, channels_last=True, bf16=True, freeze=True),
}
OURS = {"our loop, fp32": Way(bf16=False), "our loop": Way(bf16=True)}


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10 does it: one PIL image at a time through the usual transforms."""

    def __init__(self, split: ArraySplit, shift: int, flip: bool) -> None:
        self.images, self.labels = split.images.cpu().permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        steps: list[Callable[[Any], Any]] = [transforms.RandomCrop(split.images.shape[-1], padding=shift, padding_mode="reflect")]
        self.transform = transforms.Compose([*steps, *([transforms.RandomHorizontalFlip()] if flip else []), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def batches(split: ArraySplit, augment: Augment, batch: int, on_device: bool, workers: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, on the split's device, each image augmented."""
    if on_device:
        draw = generator(split.device, seed)
        while True:
            for rows in torch.randperm(len(split), generator=draw, device=split.device).split(batch):
                if len(rows) == batch:
                    x, y = split.fetch(rows)
                    yield augment(x, draw), y
    pictures = Pictures(split, augment.shift, augment.flip)
    cuda = split.device.type == "cuda"
    loader: Any = DataLoader(
        pictures, batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=cuda, persistent_workers=workers > 0
    )
    while True:
        for x, y in loader:
            yield x.to(split.device, non_blocking=True), y.to(split.device, non_blocking=True)


def plain_loop(how: Plain, model: nn.Module, source: Iterator[tuple[Tensor, Tensor]], steps: int, marks: Marks, seed: int) -> None:
    """PGD-10 adversarial training for ``steps`` steps, the beginning of each marked, and the end.

    AdamW and the learning rate's schedule are those of our loop, so that both learn alike; the weight decay is one for all
    parameters, as users do.
    """
    torch.manual_seed(derive_seed(seed, "plain"))
    device = next(model.parameters()).device
    if how.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    attack = _attack(how, model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps, 0.1))
    for _ in range(steps):
        marks.mark()
        x, y = next(source)
        if how.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=how.bf16):
            x_adv = attack(x, y)
            loss = F.cross_entropy(model(x_adv).float(), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
    marks.mark()


def _attack(how: Plain, model: nn.Module, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    if how.ours:
        draw = generator(next(model.parameters()).device, seed, "attack")

        def craft(x: Tensor, y: Tensor) -> Tensor:
            with deployed(model):
                return PGD10.craft(model, x, y, draw)

        return craft
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the library are not ours to fix
        from torchattacks import PGD
    theirs = PGD(model, eps=PGD10.epsilon, alpha=PGD10.alpha, steps=PGD10.num_steps)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        with frozen(model) if how.freeze else contextlib.nullcontext():
            return theirs(x, y)  # type: ignore[no-any-return]

    return attack


@dataclass(frozen=True)
class SideBySide:
    """Both loops on the same images with the same undefended network."""

    recipe: Recipe
    model: AMSDNConfig
    split: ArraySplit
    steps: Steps
    workers: int
    process: bool  # time by the process's own seconds

    def plain(self, how: Plain, seed: int) -> float:
        """Images a second of the user's loop."""
        marks = Marks(self.split.device, self.process)
        source = batches(self.split, self.recipe.train.augment, self.steps.batch, how.on_device, self.workers, seed)
        plain_loop(how, fresh(self.model, self.split.device), source, self.steps.warm + self.steps.timed, marks, seed)
        return self.steps.batch * self.steps.timed / marks.seconds(self.steps.warm, self.steps.warm + self.steps.timed)

    def round(self, seed: int) -> dict[str, float]:
        """Images a second of every way, one after another."""
        found = {name: self.plain(how, seed) for name, how in CHANGES.items()}
        config = kinds(self.recipe)["pgd-10"]
        for name, way in OURS.items():
            found[name] = images_per_second(config, self.model, way, self.split, self.steps, seed, self.process)
        return found


def ratios(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of every way, how many times as many images a second as the plain loop, in each round."""
    return {name: [found[name] / found[PLAIN] for found in rounds] for name in rounds[0] if name != PLAIN}
