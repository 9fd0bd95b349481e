"""The ``standard`` protocol put together from torchattacks, foolbox and ART, as somebody would who knows these libraries well.

A part is one library's attack on one threat, or on several at once; ``parts`` lists those of a protocol, in the order in which they run. The caller
gives each only the images that still stand, and judges what comes back.

Step and query counts are those of the protocol's own attacks (``EFFORTS``), as nearly as the libraries' parameters allow. For ``standard``:

    linf, l2      torchattacks APGD, 20 steps; at the headline budget also APGDT, 9 classes of 20 steps each, and Square, 500 queries: the same counts
    pixels        foolbox L0FMN, one run of 400 steps for all four budgets (ours: 100 steps of sPGD for each). torchattacks OnePixel, 100 candidates
                  a generation, and Pixle, one pixel moved at a time: 300 queries each on the curve, which ours lacks there, and at the headline budget
                  1,700 each (ours: 3,300 queries and 100 steps of sPGD)
    patch         ART AdversarialPatchPyTorch, 100 steps at the centre and at one random place (ours: 101 gradients and 203 forwards); at the headline
                  budget 11 more random places of 100 steps (ours: 11 runs of 100 steps and 500 queries)

What the libraries lack, and what was done about it:

- None takes gradients through a defence's own surrogate (BPDA). Gradient attacks are handed the surrogate that the model declares, where it answers as the model does.
- foolbox's L0 attacks count channel values and look for the fewest; an image counts where at most k *pixels* changed. L0BrendelBethge needs numba, which is no
  dependency of foolbox.
- OnePixel's population is a multiple of 5 k. Pixle moves pixels and so has no colours but the image's own; with 1x1 windows and one restart a pixel it changes at most k.
- ART's patch is one for all images of a batch, at one place: each image gets a run of its own for each place. ``apply_patch`` resizes and shifts the patch,
  which for sides that are odd gives 4x5 or 6x5 pixels at some places: what lies outside of the square is put back. It never clears the patch's gradient, so
  that steps follow the sum of all gradients so far, which did no harm where we tried it and stays.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import torch
from peer_attacks import PACKAGES, installed, quietly, run_peer
from torch import Tensor, nn

from amsdn.attacks import PatchAutoAttack, SparseAutoAttack
from amsdn.evaluation.protocol import Protocol
from amsdn.protocols import surrogate_of
from amsdn.threats import L2Ball, LinfBall, PatchRegion, SparsePixels, ThreatModel
from amsdn.utils.helpers import generator

LIBRARIES = ("torchattacks", "foolbox", "art")
POPULATION = 100  # of OnePixel: a multiple of 5 k for every k of the protocol
CURVE_QUERIES = 3  # for each step that ours has there: what a step of ours costs in forward passes
PLACES = 2  # of a patch on the curve
STEP = 0.05  # of ART's patch, in [0,1] pixel units


@dataclass
class Part:
    """One library's attack on one or several threats of a family: (model, differentiable, x, y) -> attacked images."""

    name: str
    threats: tuple[ThreatModel, ...]
    attack: Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]
    counts: dict[str, int] = field(default_factory=dict)  # what else is worth knowing of a run


def missing() -> list[str]:
    """The libraries that are not installed here."""
    return [library for library in LIBRARIES if not installed(library)]


def library_versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    return {library: version(PACKAGES[library]) for library in LIBRARIES if installed(library)}


def differentiable(model: nn.Module) -> nn.Module:
    """What gradient attacks are handed: the model's own surrogate where that answers as the model does, else the model."""
    surrogate = surrogate_of(model)
    return surrogate if surrogate is not None and getattr(surrogate, "matches_forward", False) else model


def parts(protocol: Protocol) -> list[Part]:
    """Everything that is run by hand, family by family, cheap ones first."""
    return [*_patches(protocol), *_pixels(protocol), *_balls(protocol, LinfBall, "linf", "Linf"), *_balls(protocol, L2Ball, "l2", "L2")]


def _balls(protocol: Protocol, ball: Callable[[float], ThreatModel], family: str, norm: str) -> list[Part]:
    effort, found = protocol.effort, []
    steps, queries = {"norm": norm, "num_steps": effort.ball_steps}, {"norm": norm, "num_queries": effort.square_queries}
    for epsilon in getattr(protocol.budgets, family):
        threat = (ball(epsilon),)
        found.append(Part("torchattacks APGD", threat, _gradients("apgd-ce", "torchattacks", epsilon=epsilon, **steps)))
        if epsilon == protocol.headline[family]:
            targeted = _gradients("apgd-t", "torchattacks", epsilon=epsilon, n_targets=effort.targets, **steps)
            found += [
                Part("torchattacks APGDT", threat, targeted),
                Part("torchattacks Square", threat, _queries("square", "torchattacks", epsilon=epsilon, **queries)),
            ]
    return found


def _pixels(protocol: Protocol) -> list[Part]:
    effort, budgets = protocol.effort, protocol.budgets.pixels
    nearest = fewest_values(len(budgets) * effort.curve_steps)
    found = [Part("foolbox L0FMN", tuple(SparsePixels(k) for k in budgets), nearest)]
    cascade = SparseAutoAttack(**effort.sparse)
    most = cascade.guided_restarts * cascade.guided_queries + cascade.num_queries + 2 * cascade.num_steps
    for k in budgets:
        queries = most // 2 if k == protocol.headline["sparse"] else CURVE_QUERIES * effort.curve_steps
        found += [
            Part("torchattacks OnePixel", (SparsePixels(k),), one_pixel(k, queries)),
            Part("torchattacks Pixle", (SparsePixels(k),), pixle(k, queries)),
        ]
    return found


def _patches(protocol: Protocol) -> list[Part]:
    effort, found = protocol.effort, []
    for size in protocol.budgets.patch:
        cascade = PatchAutoAttack(size, **effort.patch)
        runs = cascade.restarts + cascade.margin_restarts if size == protocol.headline["patch"] else 0
        counts: dict[str, int] = {}
        attack = art_patch(size, effort.curve_steps, PLACES + runs, counts)
        found.append(Part("ART AdversarialPatchPyTorch", (PatchRegion(size),), attack, counts))
    return found


def _gradients(family: str, library: str, **settings: float | str) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    return lambda model, differentiable, x, y: run_peer(family, library, differentiable, x, y, **settings)


def _queries(family: str, library: str, **settings: float | str) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    return lambda model, differentiable, x, y: run_peer(family, library, model, x, y, **settings)


def fewest_values(steps: int) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    """L0FMN on all images at once.

    It fails, for the whole batch, where an image stands that every value of it may change (foolbox 3.3 then asks for the value after the last): one by one
    then, and such an image stays as it is.
    """

    def attack(model: nn.Module, differentiable: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        try:
            return run_peer("l0", "foolbox", differentiable, x, y, num_steps=steps)
        except IndexError:
            if len(x) == 1:
                return x
            return torch.cat([attack(model, differentiable, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])

    return attack


def one_pixel(k: int, queries: int) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    """OnePixel on k pixels: the first generation and as many more as ``queries`` pay for, at least one."""

    def attack(model: nn.Module, differentiable: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from torchattacks import OnePixel

        population = min(POPULATION, max(queries // 2, 5 * k))
        with quietly(0):
            return OnePixel(model, pixels=k, steps=max(queries // population - 1, 1), popsize=population)(x, y).detach()  # type: ignore[no-any-return]

    return attack


def pixle(k: int, queries: int) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    """Pixle as a greedy search: k times the best of several moves of one pixel to another place; it asks twice about each."""

    def attack(model: nn.Module, differentiable: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from torchattacks import Pixle

        moves = max(queries // (2 * k), 1)
        with quietly(0):
            return Pixle(model, x_dimensions=1, y_dimensions=1, restarts=k, max_iterations=moves)(x, y).detach()  # type: ignore[no-any-return]

    return attack


def art_patch(size: int, steps: int, places: int, counts: dict[str, int]) -> Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]:
    """A patch for each image at the centre, then at random places until it is broken; ``counts`` says how often ART left the square."""

    def attack(model: nn.Module, differentiable: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        counts["patches"] = counts["larger than the square"] = 0
        gen, room, threat = generator("cpu", "places"), x.shape[2] - size, PatchRegion(size)
        corners = torch.randint(0, room + 1, (len(x), places, 2), generator=gen)
        corners[:, 0] = room // 2
        out = x.clone()
        with quietly(0):
            for i, j in ((i, j) for i in range(len(x)) for j in range(places)):
                if j and _wrong(model, out[i : i + 1], y[i : i + 1]):
                    continue
                row, column = corners[i, j].tolist()
                shown = _art_shown(differentiable, x[i : i + 1], y[i : i + 1], (column, row), size, steps)
                counts["patches"] += 1
                counts["larger than the square"] += int((~threat.contains(shown, x[i : i + 1])).sum())
                square = (slice(None), slice(row, row + size), slice(column, column + size))
                out[i] = x[i]
                out[i][square] = shown[0][square]
        return out

    return attack


def _art_shown(model: nn.Module, x: Tensor, y: Tensor, place: tuple[int, int], size: int, steps: int) -> Tensor:
    """One image [1,3,H,W] with the patch that ART makes for it, as ART shows it; ``place`` is column and row."""
    from art.attacks.evasion import AdversarialPatchPyTorch
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = model(x).shape[1]
    kind = "gpu" if x.is_cuda else "cpu"
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type=kind)
    attack = AdversarialPatchPyTorch(
        classifier,
        rotation_max=0.0,
        scale_min=0.1,  # a place of its own fixes the scale: both are read by nobody
        scale_max=1.0,
        learning_rate=STEP,
        max_iter=steps,
        batch_size=1,
        patch_shape=(3, size, size),
        patch_location=place,
        patch_type="square",
        optimizer="pgd",
        targeted=False,
        verbose=False,
    )
    image = x.cpu().numpy()
    attack.generate(image, y.cpu().numpy())
    shown = np.asarray(attack.apply_patch(image, scale=size / x.shape[2]))
    return torch.from_numpy(shown).to(x).clamp(0, 1)


@torch.no_grad()
def _wrong(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    return bool((model(x).argmax(1) != y).all())
