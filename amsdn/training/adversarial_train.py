"""Stage two: adversarial training against patches and sparse pixels, every part of the defence at once.

Half of a batch stays clean (augmented), half is attacked through the whole
defence, and a share may be given to the views that certificates ask about (``views``). Classification learns all; the anomaly maps learn where the images were truly changed; purified
features of an attacked image are pulled to those an averaged teacher sees on the clean one (Madry et al.
2018 for the min-max frame; Tarvainen and Valpola 2017 for the averaged teacher).

``amsdn train`` or ``python -m amsdn.training.adversarial_train`` runs it.
"""

from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.attacks import Attack, PatchPGD, SparsePGD
from amsdn.data.augment import Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN, AMSDNTrace
from amsdn.threats import changed_pixels
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput
from amsdn.training.objectives import accuracy, detector_losses, feature_pull
from amsdn.training.views import CertifiableViews, Drawn, deployed


@dataclass(frozen=True)
class DefenceLoss:
    """Weights of the terms that train the parts of the defence beside cross-entropy."""

    label_smoothing: float = 0.1
    anomaly_map: float = 0.5
    detection: float = 0.2
    feature_pull: float = 0.5


def default_attacks() -> tuple[Attack, ...]:
    """Patches of two sizes and many pixels, with the few steps that training can afford."""
    return (
        PatchPGD(size=5, num_steps=4, alpha=0.25, stop_when_fooled=False),
        PatchPGD(size=8, num_steps=4, alpha=0.25, stop_when_fooled=False),
        SparsePGD(k=30, num_steps=4, stop_when_fooled=False),
    )


@dataclass(frozen=True)
class AdversarialTrainConfig:
    """Stage two. Without attacks it is plain supervised training, which makes the undefended control."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    loss: DefenceLoss = field(default_factory=DefenceLoss)
    augment: Augment = field(default_factory=Augment)
    attacks: tuple[Attack, ...] = field(default_factory=default_attacks)
    attacked_share: float = 0.5  # of every batch
    clean_start: float = 0.15  # share of the run before the first attack, when gradients mean nothing yet
    views: CertifiableViews = field(default_factory=CertifiableViews)  # none by default

    def __post_init__(self) -> None:
        if self.attacks and self.attacked_share + self.views.share > 1 + 1e-9:
            raise InputError(
                f"train: attacked_share {self.attacked_share} and the views' shares {self.views.share:g} exceed the batch; make them smaller"
            )
        if not 0 < self.attacked_share <= 1 or not 0 <= self.clean_start <= 1:
            raise InputError(
                f"train: attacked_share must lie in (0, 1] and clean_start in [0, 1], got {self.attacked_share} and {self.clean_start}"
            )


class AdversarialTraining(Stage):
    """One attack a batch, drawn uniformly."""

    name = "train"

    def __init__(self, config: AdversarialTrainConfig) -> None:
        self.config = config

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        assert isinstance(model, AMSDN)
        assert isinstance(teacher, AMSDN)
        config, generator = self.config, batch.generator
        x, y = config.augment(batch.x, generator), batch.y
        drawn = config.views.draw(model, x, y, generator)
        attacks = config.attacks if batch.progress >= config.clean_start else ()
        if not attacks:
            return supervised_step(model, x, y, config.loss, config.views, drawn)
        attack = attacks[draw(torch.ones(len(attacks)), generator)]
        attacked = max(1, round(config.attacked_share * len(x)))
        return defence_step(model, teacher, attack, x, y, attacked, config.loss, generator, config.views, drawn)


def supervised_step(model: AMSDN, x: Tensor, y: Tensor, weights: DefenceLoss, views: CertifiableViews, drawn: Drawn) -> StepOutput:
    """Cross-entropy on clean images and on the views ``drawn`` from the first of x [B,3,H,W], in one pass; no attack."""
    seen = len(drawn.labels)
    logits = model(torch.cat([drawn.images, x[seen:]])).float()
    clean, y_clean = logits[len(drawn.images) :], y[seen:]
    loss = F.cross_entropy(clean, y_clean, label_smoothing=weights.label_smoothing)
    output = StepOutput(loss, {"accuracy": accuracy(clean, y_clean)})
    return add_views(output, views.loss(drawn, logits[: len(drawn.images)], weights.label_smoothing), seen / len(x))


def defence_step(
    model: AMSDN,
    teacher: AMSDN,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    attacked: int,
    weights: DefenceLoss,
    generator: torch.Generator,
    views: CertifiableViews,
    drawn: Drawn,
) -> StepOutput:
    """Of x [B,3,H,W] the first images are seen as ``drawn``, the next ``attacked`` are attacked, the others stay clean; one pass.

    The detector learns from the attacked and the clean alone: a mask or noise is no attack, yet telling it that a covered
    square is clean would teach it to overlook patches.
    """
    seen = len(drawn.labels)
    whole = len(x)
    x, y, attacked = x[seen:], y[seen:], min(attacked, whole - seen)
    x_adv = craft(model, attack, x[:attacked], y[:attacked], generator)
    changed = changed_pixels(x_adv, x[:attacked])
    joined = model.trace(torch.cat([x_adv, x[attacked:], drawn.images]))
    trace = first_of(joined, len(x))
    logits = trace.logits.float()
    terms = {
        "cross_entropy_attacked": F.cross_entropy(logits[:attacked], y[:attacked], label_smoothing=weights.label_smoothing),
        "cross_entropy_clean": F.cross_entropy(logits[attacked:], y[attacked:], label_smoothing=weights.label_smoothing)
        if attacked < len(x)
        else logits.new_zeros(()),
    }
    share = attacked / len(x)
    loss = share * terms["cross_entropy_attacked"] + (1 - share) * terms["cross_entropy_clean"]
    for name, term in detector_terms(trace, attack, changed).items():
        terms[name] = term
        loss = loss + getattr(weights, name) * term
    if weights.feature_pull:
        with torch.no_grad():
            clean = teacher.trace(x[:attacked]).features
        terms["feature_pull"] = feature_pull([f[:attacked] for f in trace.features], clean)
        loss = loss + weights.feature_pull * terms["feature_pull"]
    metrics = {name: value.detach() for name, value in terms.items()}
    metrics["accuracy_attacked"] = accuracy(logits[:attacked], y[:attacked])
    if attacked < len(x):
        metrics["accuracy"] = accuracy(logits[attacked:], y[attacked:])
    return add_views(StepOutput(loss, metrics), views.loss(drawn, joined.logits[len(x) :], weights.label_smoothing), seen / whole)


def add_views(output: StepOutput, views: StepOutput, share: float) -> StepOutput:
    """Both losses, the views' with weight ``share`` (theirs among the batch's images), the other's with the rest."""
    return StepOutput((1 - share) * output.loss + share * views.loss, output.metrics | views.metrics)


def first_of(trace: AMSDNTrace, count: int) -> AMSDNTrace:
    """The trace of the first ``count`` images alone."""

    def cut(value: Tensor | list[Tensor] | None) -> Tensor | list[Tensor] | None:
        return [v[:count] for v in value] if isinstance(value, list) else None if value is None else value[:count]

    return replace(trace, **{f.name: cut(getattr(trace, f.name)) for f in fields(trace)})  # type: ignore[arg-type]


def detector_terms(trace: AMSDNTrace, attack: Attack, changed: Tensor) -> dict[str, Tensor]:
    """What teaches the detector, named as its weights are: ``anomaly_map`` and ``detection``.

    ``changed`` [N,1,H,W] bool is where the attack changed the first N images of the traced batch; the others are clean.
    Empty without a detector, and for a dense attack: a change of every pixel has no place to point at.
    """
    if trace.anomaly_logit is None or trace.anomaly_map_logits is None or not attack.threat.counts:
        return {}
    clean = changed.new_zeros((len(trace.logits) - len(changed), *changed.shape[1:]))
    return detector_losses(trace.level_anomaly_logits, trace.anomaly_map_logits, trace.anomaly_logit, torch.cat([changed, clean]))


def craft(model: nn.Module, attack: Attack, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Attack the model as it is deployed: in eval mode, so that no batch statistics leak into the attack."""
    with deployed(model):
        return attack.craft(model, x, y, generator)


def draw(weights: Tensor, generator: torch.Generator) -> int:
    """One index, in proportion to weights [N]."""
    return int(torch.multinomial(weights.to(generator.device), 1, generator=generator))


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
