"""What the rest of the package assumes of a classifier, and what a defence may declare about itself.

A classifier maps images, float32 [B,3,H,W] in [0,1], to logits [B,K]; normalisation is its own business.
Attacks and evaluation know nothing else, so any PyTorch module that does this can be attacked and evaluated.

A defence says the truth about itself by optional attributes, and evaluation applies the matching
countermeasure, or asks the matching question, without being told to:

- ``stochastic = True``: the output varies from call to call; attacks then average over draws (EOT).
- ``differentiable_surrogate()``: a module to take gradients through where the real forward has none (BPDA).
- ``black_box = True``: it answers, but neither it nor a surrogate has gradients; so does any module around it. Attacks that
  follow gradients are refused then: they would find nothing, and that would look like robustness.
- ``classifier``, ``fill`` and ``masks(height, width)``: it answers by votes over masked views (see ``MaskedVoting``).
- ``occluded_views()``: it compares its answers to occluded views of the image (see ``OccludedViews``), or None where it does not.
- ``mask_fill``: the colour that covers (see ``mask_fill_of``), for training, double masking and occlusion alike.
- ``classifier``, ``grid``, ``parts``, ``tolerance`` and ``part_logits(x)``: it answers by votes over disjoint pixels (see ``PixelVoting``).
- ``analyze(x)``: it also detects attacks (see ``Detector``), unless ``has_detector`` is False; attacks can then evade the
  detector too, for which ``detection_threshold`` says above which anomaly score it raises the alarm.
"""

from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from amsdn.checks import insist
from amsdn.errors import InputError

GREY = (0.5, 0.5, 0.5)


class Classifier(Protocol):
    """images float32 [B,3,H,W] in [0,1] -> logits [B,K]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class Analysis(Protocol):
    """What a detecting defence says about a batch besides its logits [B,K].

    It may also have ``anomaly_logit`` [B], of which the score is the sigmoid: a score that has rounded to 0 or 1 has no
    gradient left, its logit has.
    """

    logits: Tensor  # as forward gives them
    anomaly_score: Tensor  # [B] in [0,1]
    detected: Tensor  # [B] bool
    anomaly_map: Tensor  # [B,1,H,W] in [0,1]


@runtime_checkable
class Detector(Protocol):
    """A classifier that can also say which images look attacked, and where.

    Where it decides by ``detected = anomaly_score > detection_threshold``, it should declare that threshold as an attribute,
    a number or a tensor of one: without it an attack knows only on which side of it an image lies.
    """

    def analyze(self, x: Tensor, /) -> Analysis: ...


@runtime_checkable
class MaskedVoting(Protocol):
    """A defence that answers by double masking: by what ``classifier`` says of the image under one and two of its masks."""

    classifier: nn.Module
    fill: Tensor  # [1,3,1,1], the colour of covered pixels

    def masks(self, height: int, width: int, /) -> Tensor:
        """The masks for images of this size, [M,1,H,W] bool, True where they cover."""


@runtime_checkable
class OccludedViews(Protocol):
    """How a defence by prediction consistency looks at an image: by what ``classifier`` says of it under each of its masks."""

    classifier: nn.Module
    fill: Tensor  # [1,3,1,1], the colour of covered pixels

    def masks(self, height: int, width: int, /) -> Tensor:
        """The masks for images of this size, [M,1,H,W] bool, True where they cover."""


@runtime_checkable
class PixelVoting(Protocol):
    """A defence that answers by a run-off (see ``amsdn.utils.voting``) between ``parts`` views of an image.

    No two of the views show the same pixel.
    """

    classifier: nn.Module
    grid: tuple[int, int]  # rows and columns of parts
    tolerance: float  # relative gap of two logits up to which a certificate holds a view for undecided between them

    @property
    def parts(self) -> int: ...

    def part_logits(self, x: Tensor, /) -> Tensor:
        """What ``classifier`` says of every view of images [B,3,H,W]: logits [B,T,K]."""


def pixel_voting_of(model: object) -> PixelVoting | None:
    """The model as a defence by votes over disjoint pixels, or None for one that does not declare it."""
    return model if isinstance(model, PixelVoting) else None


def masked_voting_of(model: object) -> MaskedVoting | None:
    """The model as a defence by double masking, or None for one that does not declare it."""
    return model if isinstance(model, MaskedVoting) else None


def occluded_views_of(model: object) -> OccludedViews | None:
    """The views by which the model judges consistency, or None for one that does not declare any."""
    declared = getattr(model, "occluded_views", None)
    return cast(OccludedViews | None, declared()) if callable(declared) else None


def detector_of(model: object) -> Detector | None:
    """The model as a detector, or None for one without ``analyze`` or that says ``has_detector = False``."""
    return model if isinstance(model, Detector) and getattr(model, "has_detector", True) else None


def threshold_of(model: object) -> Tensor | None:
    """The declared detection threshold, a tensor of no dimensions; None without one. Raises InputError for anything else than a number.

    Where checks are put off (``amsdn.checks``), it is later that it raises for a number that is not finite.
    """
    declared = getattr(model, "detection_threshold", None)
    if declared is None:
        return None
    try:
        threshold = torch.as_tensor(declared, dtype=torch.float32).detach().reshape(())
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"detection_threshold must be one number, the anomaly score of the alarm; got {declared!r}") from e
    seen = threshold.clone()  # a model's own buffer may be another number when the check is made
    insist(seen.isfinite(), lambda: InputError(f"detection_threshold must be a finite number, got {float(seen)}; calibrate the detector"))
    return threshold


def mask_fill_of(model: nn.Module) -> Tensor:
    """The colour of covered pixels, float32 [1,3,1,1] on the model's device: its ``mask_fill``, grey .5 where it declares none.

    Training and certificates must cover with the same colour, so both ask here. Raises InputError for anything else than
    three numbers in [0,1]; for numbers outside of it later, where checks are put off (``amsdn.checks``). Nobody waits for the
    device where the model declares a tensor that is there, or declares nothing.
    """
    device = device_of(model)
    if not hasattr(model, "mask_fill"):
        return torch.full((1, 3, 1, 1), GREY[0], device=device)
    declared = model.mask_fill
    try:
        fill = torch.as_tensor(declared, dtype=torch.float32, device=device).detach().reshape(1, 3, 1, 1)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"mask_fill must be a colour, three numbers in [0,1]; got {declared!r}") from e
    seen = fill.clone()
    insist(((seen >= 0) & (seen <= 1)).all(), lambda: InputError(f"mask_fill must be a colour in [0,1], got {seen.flatten().tolist()}"))
    return fill


def is_stochastic(model: object) -> bool:
    """Whether two forward passes on one image may differ by design."""
    return bool(getattr(model, "stochastic", False))


def is_black_box(model: object) -> bool:
    """Whether the model, or for a module any part of it, answers without gradients to follow."""
    parts = model.modules() if isinstance(model, nn.Module) else (model,)
    return any(bool(getattr(part, "black_box", False)) for part in parts)


def surrogate_of(model: nn.Module) -> nn.Module | None:
    """The model's own differentiable stand-in, or None where its gradients are already honest."""
    make = getattr(model, "differentiable_surrogate", None)
    return cast("nn.Module | None", make()) if callable(make) else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters live; the CPU for a model without any."""
    tensors: Any = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def check_images(x: Tensor, where: str) -> None:
    """Raise InputError unless ``x`` is a float batch [B,3,H,W] of finite values in [0,1]."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise InputError(f"{where}: images must have shape [B,3,H,W], got {list(x.shape)}; stack them and repeat grey channels")
    if not x.is_floating_point():
        raise InputError(f"{where}: images must be floating point in [0,1], got {x.dtype}; divide uint8 by 255")
    if x.numel() == 0:
        raise InputError(f"{where}: the batch is empty, shape {list(x.shape)}; pass at least one image")
    low, high = (float(v) for v in torch.aminmax(x))
    if not (low >= 0.0 and high <= 1.0):  # also true of NaN
        raise InputError(f"{where}: pixels must lie in [0,1] and be finite, got range [{low:.3g}, {high:.3g}]; undo any normalisation")


def check_eval_mode(model: object, where: str) -> None:
    """Raise InputError if any part of the model is in train mode (batch statistics would leak between images)."""
    if isinstance(model, nn.Module) and any(m.training for m in model.modules()):
        raise InputError(f"{where}: the classifier is in train mode; call model.eval() first")
