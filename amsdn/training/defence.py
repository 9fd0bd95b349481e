"""The step that adversarial training and fine-tuning share: clean, attacked and certifiable images through every part of the defence.

Part of a batch is seen as the views that certificates ask about, part is attacked through the whole defence, the rest stays clean.
Classification learns all; the anomaly maps learn where the images were truly changed; the purified evidence of an attacked image is
pulled to what an averaged teacher sees on the clean one (Madry et al. 2018 for the min-max frame; Tarvainen and Valpola 2017 for
the averaged teacher). What attacked images cost, how attacks are drawn, whether labels follow the model and whether weights are
perturbed are objects of their own.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from amsdn.attacks import Attack
from amsdn.data.augment import Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN, AMSDNTrace
from amsdn.threats import changed_pixels
from amsdn.training.attack_mix import AttackSampler, UniformMix
from amsdn.training.attack_ranges import TrainingAttack
from amsdn.training.awp import WeightPerturbation
from amsdn.training.objectives import accuracy, detector_losses, feature_pull
from amsdn.training.self_adaptive import LabelMemory, SelfAdaptiveLabels, Targets
from amsdn.training.settings import LoopConfig
from amsdn.training.stage import Batch, Stage, StepOutput
from amsdn.training.trades import AttackedLoss, LabelEntropy
from amsdn.training.views import CertifiableViews, Drawn, deployed


@dataclass(frozen=True)
class DefenceLoss:
    """Weights of the terms that train the parts of the defence beside cross-entropy."""

    label_smoothing: float = 0.1
    anomaly_map: float = 0.5
    detection: float = 0.2
    feature_pull: float = 0.5


@dataclass(frozen=True)
class DefenceConfig:
    """What the two stages have in common. Shares are of every batch; what they leave over is clean. Raises InputError."""

    loop: LoopConfig = field(default_factory=LoopConfig)
    loss: DefenceLoss = field(default_factory=DefenceLoss)
    augment: Augment = field(default_factory=Augment)
    attacks: tuple[TrainingAttack, ...] = ()
    attacked_share: float = 0.5
    mix: UniformMix = UniformMix()  # how often each attack is met
    objective: AttackedLoss = LabelEntropy()  # what attacked images cost
    labels: SelfAdaptiveLabels = SelfAdaptiveLabels()  # off by default
    awp: WeightPerturbation = WeightPerturbation()  # off by default
    views: CertifiableViews = field(default_factory=CertifiableViews)  # none by default

    def __post_init__(self) -> None:
        for entry in self.attacks:
            self.objective.check(entry)


@dataclass(frozen=True)
class Scene:
    """One part of a batch as a step sees it: views of the first images, attacks on the next, the others clean."""

    x: Tensor  # [B,3,H,W], augmented
    y: Tensor  # [B]
    targets: Targets  # of all B images
    drawn: Drawn
    attacked: int  # how many

    @property
    def seen(self) -> int:
        """How many images are seen as views: the number of the first that is attacked."""
        return len(self.drawn.labels)

    @property
    def victims(self) -> slice:
        """Which images are attacked."""
        return slice(self.seen, self.seen + self.attacked)


class DefenceStage(Stage):
    """A stage whose batches meet one drawn attack each, or none."""

    def __init__(self, config: DefenceConfig, images: int | None = None) -> None:
        """``images`` is the size of the training split, which self-adaptive labels need."""
        self.config = config
        self.sampler = AttackSampler(config.attacks, config.mix)
        self.labels = LabelMemory(config.labels, images)

    @abstractmethod
    def attacks_at(self, progress: float) -> bool:
        """Whether batches at that share of the run are attacked."""

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        assert isinstance(model, AMSDN)
        assert isinstance(teacher, AMSDN)
        config = self.config
        x, y = config.augment(batch.x, batch.generator), batch.y
        drawn = config.views.at(batch.progress).draw(model, x, y, batch.generator)
        targets = self.labels.recall(batch.index, y, model.config.num_classes, batch.progress)
        if not self.attacks_at(batch.progress):
            return supervised_step(model, config, Scene(x, y, targets, drawn, 0))
        chosen, attack = self.sampler.draw(batch.host)
        attacked = min(max(1, round(config.attacked_share * len(x))), len(x) - len(drawn.labels))
        output = defence_step(model, teacher, attack, config, Scene(x, y, targets, drawn, attacked), batch.generator)
        output.memory |= self.sampler.memory(chosen, 1 - output.metrics["accuracy_attacked"])
        return output

    def remember(self, memories: Sequence[dict[str, Tensor]]) -> None:
        self.sampler.remember(memories)
        self.labels.remember(memories)

    def state(self) -> dict[str, Any]:
        return {"mix": self.sampler.state(), "labels": self.labels.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.sampler.load(state["mix"])
        self.labels.load(state["labels"])


def supervised_step(model: AMSDN, config: DefenceConfig, scene: Scene) -> StepOutput:
    """Cross-entropy on clean images and on the views of the first of them, in one pass; no attack."""
    seen, views = scene.seen, len(scene.drawn.images)
    shown = torch.cat([scene.drawn.images, scene.x[seen:]])
    logits = model.trace(shown, straight_through=False).logits.float()  # one view, also where the deployed model asks several
    clean = logits[views:]
    targets = scene.targets.following(clean, seen)
    loss = targets.mean(targets.cross_entropy(clean, seen, config.loss.label_smoothing), seen)
    output = StepOutput(loss, {"accuracy": accuracy(clean, scene.y[seen:])}, targets.memory())
    return add_views(output, config.views.loss(scene.drawn, logits[:views], config.loss.label_smoothing), seen / len(scene.x))


def defence_step(
    model: AMSDN, teacher: AMSDN, attack: Attack, config: DefenceConfig, scene: Scene, generator: torch.Generator
) -> StepOutput:
    """Attack the scene's victims, perturb the weights if so configured, and give the loss of everything shown, in one pass.

    The detector learns from the attacked and the clean alone: a mask or noise is no attack, yet telling it that a covered
    square is clean would teach it to overlook patches.
    """
    x, y = scene.x[scene.victims], scene.y[scene.victims]
    x_adv = craft(model, config.objective.arm(attack, model, x), x, y, generator)
    evidence = None
    if config.loss.feature_pull:
        with torch.no_grad():
            evidence = teacher.trace(x).evidence

    def learn() -> StepOutput:
        return defence_loss(model, attack, config, scene, x_adv, evidence)

    restore = config.awp.ascend(model, lambda: learn().loss)
    try:
        return replace(learn(), after_backward=restore)
    except BaseException:
        if restore is not None:
            restore()
        raise


def defence_loss(
    model: AMSDN, attack: Attack, config: DefenceConfig, scene: Scene, x_adv: Tensor, evidence: list[Tensor] | None
) -> StepOutput:
    """What the model's answers cost: to ``x_adv`` [n,3,H,W], to the clean images (with the attacked ones' own, if wanted), to the views.

    ``evidence`` is the teacher's on the clean originals of ``x_adv``.
    """
    weights, twins, n = config.loss, config.objective.wants_twins, len(x_adv)
    first = scene.seen if twins else scene.seen + n
    joined = model.trace(torch.cat([x_adv, scene.x[first:], scene.drawn.images]))
    trace = first_of(joined, n + len(scene.x) - first)
    attacked, clean = trace.logits[:n].float(), trace.logits[n:].float()
    targets = scene.targets.following(clean, first)
    costs = config.objective(attacked, clean[:n] if twins else None, targets, scene.seen, weights.label_smoothing)
    others = clean[n:] if twins else clean
    by_label = torch.cat([costs.label, targets.cross_entropy(others, scene.seen + n, weights.label_smoothing)])
    loss = targets.mean(by_label, scene.seen) + costs.moved.sum() / len(by_label)
    terms = detector_terms(trace, attack, changed_pixels(x_adv, scene.x[scene.victims]))
    if evidence is not None:
        terms["feature_pull"] = feature_pull([e[:n] for e in trace.evidence], evidence)
    for name, term in terms.items():
        loss = loss + getattr(weights, name) * term
    metrics = {name: term.detach() for name, term in terms.items()} | label_metrics("_attacked", attacked, scene, scene.seen)
    if len(clean):
        metrics |= label_metrics("", clean, scene, first)
    if twins:
        metrics["moved"] = costs.moved.detach().mean()
    views = config.views.loss(scene.drawn, joined.logits[len(trace.logits) :], weights.label_smoothing)
    return add_views(StepOutput(loss, metrics, targets.memory()), views, scene.seen / len(scene.x))


def label_metrics(suffix: str, logits: Tensor, scene: Scene, first: int) -> dict[str, Tensor]:
    """Accuracy and cross-entropy of logits [n,K] on the scene's images from number ``first`` on, by their given labels."""
    y = scene.y[first : first + len(logits)]
    entropy = torch.nn.functional.cross_entropy(logits.detach(), y)
    return {f"cross_entropy{suffix or '_clean'}": entropy, f"accuracy{suffix}": accuracy(logits, y)}


def add_views(output: StepOutput, views: StepOutput, share: float) -> StepOutput:
    """Both losses, the views' with weight ``share`` (theirs among the batch's images), the other's with the rest."""
    return replace(output, loss=(1 - share) * output.loss + share * views.loss, metrics=output.metrics | views.metrics)


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


def check_shares(config: DefenceConfig, stage: str) -> None:
    """Raise InputError where labels are to follow answers that no image without an attack gives."""
    if config.labels.start < 1 and not config.objective.wants_twins and config.attacked_share + config.views.share >= 1:
        raise InputError(f"{stage}: labels follow answers to clean images, and attacks and views leave none; make their shares smaller")
