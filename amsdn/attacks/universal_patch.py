"""AdvPatch: one patch for all images, under random transformations (Brown et al., NIPS workshop 2017).

``AdvPatch.fit`` learns a patch on some images; ``ApplyPatch`` and ``success_rate`` judge it on others. As an attack,
``AdvPatch`` is transductive: it learns one patch on the very batch it attacks.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from amsdn.attacks.adaptive import frozen, reproducible
from amsdn.attacks.base import ActiveSet, Attack, Victim, check_gradients, check_indices, on_device, require, require_at_least_one
from amsdn.attacks.losses import MARGIN, Goal, Loss
from amsdn.attacks.physical import DIGITAL, Transformations, apply
from amsdn.attacks.printing import load_png, quantised, read_sidecar, save_png, write_sidecar
from amsdn.errors import InputError
from amsdn.protocols import Classifier, check_eval_mode, check_images
from amsdn.records import canonical, config_hash
from amsdn.threats import PatchRegion


@dataclass(frozen=True)
class LogSuccess(Loss):
    """The log-probability that the goal is reached: log p(target), or log(1 - p(label)) where there is no target.

    Targeted, it is Brown et al.'s objective. Untargeted, one might lower log p(label); but that loss has no bottom, so
    images that are fooled long since would keep pulling at the shared patch, and those that stand firm (p near 1)
    would hardly. This one is the same objective for the event "not the label".
    """

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        column = goal.labels.unsqueeze(1)
        others = logits.scatter(1, column, -torch.inf).logsumexp(1)
        lead = logits.gather(1, column).squeeze(1) - others
        return -F.softplus(-lead if goal.targeted else lead)


@dataclass(frozen=True, eq=False)
class UniversalPatch:
    """A finished patch: content [3,s,s] float32 on the CPU, every value k/255, and the configuration that made it."""

    content: Tensor
    attack: Mapping[str, Any]  # records.canonical of the AdvPatch

    @property
    def digest(self) -> str:
        """Twelve hex digits that change with any value of the content."""
        return content_digest(self.content)

    def save(self, path: Path | str, **more: Any) -> None:
        """Write the content as PNG, which loses nothing, and beside it, in PATH.json, the settings and ``more``."""
        save_png(self.content, path)
        write_sidecar(path, {"digest": self.digest, "attack": self.attack, **more})

    @classmethod
    def load(cls, path: Path | str) -> "UniversalPatch":
        """What ``save`` wrote. Raises InputError where a file is missing or damaged or the two do not belong together."""
        content, told = load_png(path), read_sidecar(path)
        if told.get("digest") != content_digest(content) or not isinstance(told.get("attack"), dict):
            raise InputError(f"{path}: its .json describes another patch ({told.get('digest')}); keep both files from one run")
        return cls(content, told["attack"])


@dataclass(frozen=True)
class AdvPatch(Attack):
    """One square patch that fools a classifier on all images, wherever it is put (Brown et al. 2017).

    ``fit`` maximises the mean of ``loss`` over images and ``transformations``: each step renders the patch on
    ``batch_size`` images (in ``fit``), under ``draws`` transformations each, and moves every value by up to ``alpha``
    along the sign of the running mean (``momentum``) of the gradient. The step shrinks linearly to zero. Brown et al.
    do not name their optimiser; a signed step needs no learning rate that depends on the model.

    As an attack, ``perturb`` learns on the whole batch it is given at once (transductive) and then keeps, per image,
    the worst of ``tries`` transformations: per image at most num_steps x draws + tries forwards and num_steps x draws
    backwards. All images of a batch get the same patch, so a sample's result depends on the others. For results on
    unseen images, ``fit`` and then ``ApplyPatch`` or ``success_rate``.

    With ``target_class``, the patch is trained towards that class whatever the caller's goal; without, towards the goal.
    """

    size: int = 8  # side, in pixels, of the square that bounds the patch as it is seen
    num_steps: int = 500
    alpha: float = 0.05  # the first step, in pixel value
    momentum: float = 0.9
    batch_size: int = 64  # images a step, in fit
    draws: int = 1  # transformations an image and step
    tries: int = 16  # transformations an image of which perturb keeps the worst
    target_class: int | None = None  # what the patch is to be taken for; None: what the goal says
    transformations: Transformations = DIGITAL
    loss: Loss = LogSuccess()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, self, "alpha must be positive", self.alpha)
        require(0 <= self.momentum < 1, self, "momentum must lie in [0, 1)", self.momentum)
        require_at_least_one(self, "num_steps", "batch_size", "draws", "tries")
        require(self.target_class is None or self.target_class >= 0, self, "target_class must be a class index", self.target_class)

    @property
    def threat(self) -> PatchRegion:
        return PatchRegion(self.size)

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        content = self._learn(victim, x, self._aim(goal), len(x), generator, progress=False)
        return worst_of_draws(self.active(victim, x, goal), content, self.size, self.transformations, self.tries, generator)

    def fit(
        self, model: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator | None = None, *, progress: bool = False
    ) -> UniversalPatch:
        """Learn one patch on images [N,3,H,W] with labels [N]; without a generator, seed 0.

        Untargeted, or towards ``target_class``; images of the target class are then left out. Costs num_steps x draws
        passes over ``batch_size`` images. Raises InputError for a model in train mode and for unusable images, labels or target.
        """
        where = "AdvPatch.fit"
        check_images(images, where)
        check_eval_mode(model, where)
        check_gradients(self, model, where)
        check_indices(labels, images, where, "labels")
        if self.target_class is not None:
            keep = labels != self.target_class
            images, labels = images[keep], labels[keep]
            require(len(images) > 0, self, "images of other classes than the target are needed, target_class", self.target_class)
        images, labels, generator = images.detach().float(), labels.long(), on_device(generator, images)
        victim = Victim.of(model, len(images), images.device, self.eot_samples)
        with ExitStack() as stack:
            stack.enter_context(frozen(*victim.modules))
            if victim.stochastic:
                stack.enter_context(reproducible(images, generator))
            _check_classes(victim, images, labels, self.target_class, where)
            goal = self._aim(Goal(labels))
            content = self._learn(victim, images, goal, min(self.batch_size, len(images)), generator, progress)
        return UniversalPatch(content.cpu(), canonical(self))

    def _aim(self, goal: Goal) -> Goal:
        return goal if self.target_class is None else Goal(torch.full_like(goal.labels, self.target_class), targeted=True)

    def _learn(self, victim: Victim, x: Tensor, goal: Goal, batch_size: int, generator: torch.Generator, progress: bool) -> Tensor:
        """The patch, [3,size,size] with values k/255."""
        content = torch.rand(3, self.size, self.size, generator=generator, device=x.device)
        mean = torch.zeros_like(content)
        rows = endless_batches(len(x), batch_size, generator)
        with tqdm(range(self.num_steps), desc="patch", unit="step", disable=not progress) as bar:
            for step in bar:
                batch = next(rows)
                gradient, loss = self._gradient(victim.select(batch), x[batch], goal.select(batch), content, generator)
                mean = self.momentum * mean + gradient / gradient.abs().mean().clamp_min(1e-12)
                content = (content + self.alpha * (1 - step / self.num_steps) * mean.sign()).clamp(0, 1)
                if progress and step % 20 == 0:
                    bar.set_postfix_str(
                        f"success {loss.exp().mean():.1%}" if isinstance(self.loss, LogSuccess) else f"loss {loss.mean():.3g}"
                    )
        return quantised(content)

    def _gradient(self, victim: Victim, x: Tensor, goal: Goal, content: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The gradient of the summed loss by the content, [3,size,size], and the last draw's loss, [B]."""
        total = torch.zeros_like(content)
        for _ in range(self.draws):
            leaf = content.clone().requires_grad_(True)
            with torch.enable_grad():
                shown = apply(x, leaf, self.transformations.sample(len(x), self.size, generator))
            at_image, loss, _ = victim.gradient(shown.detach(), lambda logits: self._reward(logits, goal))
            total = total + torch.autograd.grad(shown, leaf, at_image)[0]
        return total, loss

    def _reward(self, logits: Tensor, goal: Goal) -> Tensor:
        """The loss [B] of logits [B,K]; raises InputError where ``target_class`` is none of the K classes."""
        classes = logits.shape[1]
        require(self.target_class is None or self.target_class < classes, self, f"target_class must be below {classes}", self.target_class)
        return self.loss(logits, goal)


@dataclass(frozen=True)
class ApplyPatch(Attack):
    """A finished patch, a PNG file, put on every image: the worst per image of ``tries`` random transformations.

    ``digest`` ties the configuration to the patch's content: it is read from the file when left empty, and a file
    that does not match it is refused, so two patches never share a configuration hash. ``tries`` forwards an image.
    """

    path: Path
    size: int = 8  # side, in pixels, of the square that bounds the patch as it is seen; the content may be finer
    tries: int = 16
    transformations: Transformations = DIGITAL
    digest: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tries >= 1, self, "tries must be at least 1", self.tries)
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "digest", self.digest or content_digest(load_png(self.path)))
        self._content()

    @property
    def threat(self) -> PatchRegion:
        return PatchRegion(self.size)

    @property
    def needs_gradients(self) -> bool:
        return False

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        content = self._content().to(x.device)
        return worst_of_draws(self.active(victim, x, goal), content, self.size, self.transformations, self.tries, generator)

    def _content(self) -> Tensor:
        content = load_png(self.path)
        if content_digest(content) != self.digest:
            raise InputError(
                f"{self.path}: its content ({content_digest(content)}) is not that of digest {self.digest}; the file has changed"
            )
        return content


@dataclass(frozen=True)
class PatchSuccess:
    """How often a patch fooled each image, over random transformations; every field has one entry per image, [N].

    ``fooled`` and ``hit`` are shares in [0,1] of the draws. Neither is meaningful for every image: see ``attackable``
    and ``targetable``. A stochastic model's answer is the vote of several calls, as in AttackResult.
    """

    fooled: Tensor  # draws whose prediction is not the label
    hit: Tensor  # draws whose prediction is the target; zeros without a target
    attackable: Tensor  # bool: the clean image is classified correctly, so that there is something to fool
    targetable: Tensor  # bool: and its label is not the target

    def untargeted(self) -> Tensor:
        """The share of draws fooled, of the images classified correctly without the patch."""
        return self.fooled[self.attackable]

    def targeted(self) -> Tensor:
        """The share of draws that hit the target, of the images classified correctly as another class without the patch."""
        return self.hit[self.targetable]


def success_rate(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    patch: Tensor,
    transformations: Transformations,
    draws: int,
    generator: torch.Generator | None = None,
    *,
    size: int | None = None,
    target: int | None = None,
    batch_size: int = 100,
    progress: bool = False,
) -> PatchSuccess:
    """How often the patch [3,s,s] fools each of images [N,3,H,W], over ``draws`` transformations each.

    ``size`` is the side in pixels at which it is shown, its own by default. Brown et al. count every draw whose
    prediction is the target; here an image the model gets wrong anyway, or of the target class, counts for neither rate.
    Raises InputError for a model in train mode and for unusable images, labels or target.
    """
    where = "success_rate"
    check_images(images, where)
    check_eval_mode(model, where)
    check_indices(labels, images, where, "labels")
    if draws < 1 or batch_size < 1:
        raise InputError(f"{where}: draws and batch_size must be at least 1, got {draws} and {batch_size}")
    generator = on_device(generator, images)
    patch, size = patch.to(images.device), size or patch.shape[-1]
    parts: list[tuple[Tensor, ...]] = []
    with ExitStack() as stack, tqdm(total=len(images) * draws, desc="patched", unit="image", disable=not progress) as bar:
        whole = Victim.of(model, len(images), images.device)
        if whole.stochastic:
            stack.enter_context(reproducible(images, generator))
        _check_classes(whole, images.detach().float(), labels, target, where)
        for x, y in zip(images.detach().float().split(batch_size), labels.long().split(batch_size), strict=True):
            victim = Victim.of(model, len(x), x.device)
            fooled, hit = torch.zeros(2, len(x), device=x.device)
            correct = _answer(victim, x) == y
            for _ in range(draws):
                answer = _answer(victim, apply(x, patch, transformations.sample(len(x), size, generator)))
                fooled += answer != y
                hit += answer == (-1 if target is None else target)
                bar.update(len(x))
            other = correct if target is None else correct & (y != target)
            parts.append((fooled / draws, hit / draws, correct, other))
    return PatchSuccess(*(torch.cat(column) for column in zip(*parts, strict=True)))


def worst_of_draws(
    active: ActiveSet, content: Tensor, size: int, transformations: Transformations, tries: int, generator: torch.Generator
) -> Tensor:
    """Each image of ``active`` with the same patch under the worst, by margin, of ``tries`` transformations, [B,3,H,W]."""
    active.poll_every = 1  # tries are few: each on images that are fooled already costs more than a look
    for _ in range(tries):
        x_adv = apply(active.x, content, transformations.sample(len(active), size, generator))
        active.record(x_adv, *active.query(x_adv, MARGIN))
        if not len(active):
            break
    return active.result()


def content_digest(content: Tensor) -> str:
    """Twelve hex digits of the patch's 8-bit values and its size."""
    return config_hash(content.mul(255).round().int().tolist())


def endless_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows int64 [batch_size] without end: each epoch shuffled and its remainder dropped; all rows in order if they are one batch."""
    while True:
        if batch_size >= count:
            yield torch.arange(count, device=generator.device)
            continue
        order = torch.randperm(count, generator=generator, device=generator.device)
        yield from order[: count - count % batch_size].split(batch_size)


def _answer(victim: Victim, x: Tensor) -> Tensor:
    return (victim.vote(x) if victim.stochastic else victim.logits(x)).argmax(1)


def _check_classes(victim: Victim, images: Tensor, labels: Tensor, target: int | None, where: str) -> None:
    """Raise InputError if a label or the target is none of the model's classes; asks the model for one image."""
    classes = victim.select(torch.arange(1, device=images.device)).averaging(1).logits(images[:1]).shape[1]
    asked = [int(labels.min()), int(labels.max()), *([] if target is None else [target])]
    wrong = [c for c in asked if not 0 <= c < classes]
    if wrong:
        raise InputError(f"{where}: class {wrong[0]} is outside the {classes} classes; check the labels and the target")
