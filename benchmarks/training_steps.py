"""What a training step costs in our own loop: the loop, the stage and the model are those of ``amsdn train``."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_machine import Marks, count_flops

from amsdn.attacks import PGDAttack
from amsdn.data import Split
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.recipes import Recipe, get_recipe
from amsdn.training.adversarial_train import AdversarialTrainConfig, AdversarialTraining
from amsdn.training.defence import DefenceLoss
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput, train
from amsdn.training.views import CertifiableViews

PGD10 = PGDAttack(epsilon=8 / 255, alpha=2 / 255, num_steps=10, stop_when_fooled=False)
COUNTED = 20  # images of a batch whose operations are counted: shares in twentieths come out exact


@dataclass(frozen=True)
class Way:
    """How the same step is computed."""

    bf16: bool = False
    channels_last: bool = True
    compiled: bool = False

    @property
    def name(self) -> str:
        """``bf16, channels last``"""
        parts = ["bf16" if self.bf16 else "fp32", "channels last" if self.channels_last else "NCHW"]
        return ", ".join([*parts, "compiled"] if self.compiled else parts)


@dataclass(frozen=True)
class Steps:
    """So many timed steps of ``batch`` images each, after ``warm`` others."""

    batch: int
    timed: int
    warm: int = 1


def models(recipe: Recipe, device: torch.device) -> dict[str, AMSDNConfig]:
    """The models measured: the compact one of the CPU recipe; on a GPU also the residual network and the ConvNeXts at stem stride 2.

    Whether they have a pyramid, attention and purification is the recipe's word.
    """
    compact = get_recipe("cifar10-cpu").model
    parts = {"fpn": recipe.model.fpn, "attention": recipe.model.attention, "purification": recipe.model.purification}
    found = {"compact": replace(compact, **parts)}
    if device.type == "cuda":
        found["preact18"] = AMSDNConfig(variant="preact18", fpn_channels=64, **parts)
        found |= {variant: AMSDNConfig(variant=variant, stem_stride=2, **parts) for variant in ("pico", "tiny")}
    return found


def kinds(recipe: Recipe) -> dict[str, AdversarialTrainConfig]:
    """The steps measured: clean; every image under PGD-10, cross-entropy alone; a batch as the recipe's main stage trains it.

    The recipe's warm-up without attacks is left out, so that every step is one of its dear ones.
    """
    plain = AdversarialTrainConfig(
        loss=DefenceLoss(label_smoothing=0, feature_pull=0),
        augment=recipe.train.augment,
        attacks=(),
        clean_start=0,
        views=CertifiableViews(),
    )
    pgd = replace(plain, attacks=(PGD10,), attacked_share=1.0)
    return {"clean": plain, "pgd-10": pgd, "flagship": replace(recipe.train, clean_start=0)}


def each_attack(config: AdversarialTrainConfig) -> list[AdversarialTrainConfig]:
    """The same step once for every attack that it may draw, so that a cost is the mean over attacks and no matter of luck.

    This takes each to be drawn equally often, as ``UniformMix`` does.
    """
    return [replace(config, attacks=(attack,)) for attack in config.attacks] or [config]


def loop_config(way: Way, steps: Steps, images: int, seed: int) -> LoopConfig:
    """The loop's settings for exactly warm + timed + 1 steps: the start of the last one ends the timed ones."""
    per_epoch = images // steps.batch
    epochs = (steps.warm + steps.timed + 1) / per_epoch
    return LoopConfig(
        epochs=epochs, batch_size=steps.batch, mixed_precision=way.bf16, compile=way.compiled, seed=seed, checkpoint_every_s=1e9
    )


class Watched(Stage):
    """A stage whose steps' beginnings are marked; it also lays weights and images out as NCHW where that is wanted.

    The loop itself always takes channels-last, so this is the only way to see what that is worth.
    """

    def __init__(self, stage: Stage, marks: Marks, channels_last: bool) -> None:
        self.stage, self.marks, self.channels_last, self.name = stage, marks, channels_last, stage.name

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        self.marks.mark()
        if not self.channels_last:
            if len(self.marks) == 1:
                model.to(memory_format=torch.contiguous_format)
                teacher.to(memory_format=torch.contiguous_format)
            batch = replace(batch, x=batch.x.contiguous())
        return self.stage.step(model, teacher, batch)

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        self.stage.remember(memories)

    def extra_modules(self) -> nn.ModuleDict:
        return self.stage.extra_modules()

    def state(self) -> dict[str, Any]:
        return self.stage.state()

    def load(self, state: dict[str, Any]) -> None:
        self.stage.load(state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars within."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def run_steps(config: AdversarialTrainConfig, model: nn.Module, split: Split, loop: LoopConfig, marks: Marks, channels_last: bool) -> None:
    """Train ``model`` in place by ``amsdn.training.loop``, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        train(Watched(AdversarialTraining(config, len(split)), marks, channels_last), model, split, loop, Path(folder))


def fresh(config: AMSDNConfig, device: torch.device) -> AMSDN:
    """The model with the same first weights every time."""
    torch.manual_seed(0)
    return AMSDN.from_config(config).to(device)


def images_per_second(
    config: AdversarialTrainConfig, model: AMSDNConfig, way: Way, split: Split, steps: Steps, seed: int, process: bool
) -> float:
    """Of the timed steps together, data, augmentation, optimizer and averaging of weights included; each attack in as many steps."""
    ways = each_attack(config)
    few = replace(steps, timed=-(-steps.timed // len(ways)))
    seconds = 0.0
    for one in ways:
        marks = Marks(split.device, process)
        run_steps(one, fresh(model, split.device), split, loop_config(way, few, len(split), seed), marks, way.channels_last)
        assert len(marks) == few.warm + few.timed + 1, f"{len(marks)} parts in {few}: the batch was divided"
        seconds += marks.seconds(few.warm, few.warm + few.timed)
    return few.batch * few.timed * len(ways) / seconds


def step_flops(config: AdversarialTrainConfig, model: AMSDNConfig, split: Split, batch: int) -> float:
    """Operations for an image of a step of ``batch`` images, the mean over the attacks that it may draw."""
    counts = []
    for one in each_attack(config):
        made, loop = fresh(model, split.device), loop_config(Way(), Steps(batch, 0, 0), len(split), 0)
        counts.append(count_flops(lambda one=one, made=made, loop=loop: run_steps(one, made, split, loop, Marks(split.device), True)))  # type: ignore[misc]
    return sum(counts) / len(counts) / batch


def forward_flops(model: AMSDNConfig, size: int) -> float:
    """Operations for one image forward through the model as a training step sees it."""
    return counted(model, size, False, count_flops) / 2


def counted(model: AMSDNConfig, size: int, training: bool, count: Callable[[Callable[[], object]], int]) -> int:
    """What ``count`` finds in a pass of two images forward, with ``training`` backward too."""
    made, x = fresh(model, torch.device("cpu")), torch.zeros(2, 3, size, size)

    def work() -> None:
        with torch.set_grad_enabled(training):
            logits = made.trace(x).logits
        if training:
            logits.sum().backward()  # type: ignore[no-untyped-call]

    return count(work)
