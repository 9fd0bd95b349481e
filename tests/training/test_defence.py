"""The step that both stages share, with every ingredient: what the loss is, what is remembered, what a killed run ends with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.attacks import NFGSM, PGDAttack, SparsePGD
from amsdn.data import ArraySplit, Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.threats import changed_pixels
from amsdn.training.adversarial_train import AdversarialTrainConfig, AdversarialTraining
from amsdn.training.attack_mix import ErrorProportional
from amsdn.training.attack_ranges import OneStepSparse, PatchSizes, PixelCounts
from amsdn.training.awp import WeightPerturbation
from amsdn.training.defence import (
    DefenceConfig,
    DefenceLoss,
    Scene,
    craft,
    defence_loss,
    defence_step,
    detector_terms,
    first_of,
    supervised_step,
)
from amsdn.training.finetune_attacks import FinetuneConfig, Finetuning
from amsdn.training.loop import Batch, LoopConfig, train
from amsdn.training.objectives import divergence
from amsdn.training.self_adaptive import SelfAdaptiveLabels, Targets
from amsdn.training.smooth_adversary import SmoothAdversary
from amsdn.training.trades import Trades
from amsdn.training.views import CertifiableViews, Drawn, GreedyCutout

PLAIN = DefenceLoss(label_smoothing=0.1, anomaly_map=0, detection=0, feature_pull=0)
SPARSE = SparsePGD(6, 2, stop_when_fooled=False)
LOOP = LoopConfig(epochs=1.25, batch_size=10, learning_rate=1e-3, checkpoint_every_s=0)
STILL = Augment(flip=False, shift=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene_of(split: ArraySplit, attacked: int, soft: Tensor | None = None, momentum: float = 1.0) -> Scene:
    x, y = split.fetch(torch.arange(10))
    targets = Targets(torch.arange(10), F.one_hot(y, 2).float() if soft is None else soft, momentum)
    return Scene(x, y, targets, Drawn(x[:0], y[:0], ()), attacked)


def batch_of(split: ArraySplit, progress: float = 0.7, seed: int = 0) -> Batch:
    x, y = split.fetch(torch.arange(10, 20))
    return Batch(x, y, torch.arange(10, 20), seeded(seed), seeded(seed), progress)


def test_by_default_the_loss_is_the_mean_cross_entropy_of_attacked_and_clean_images(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    scene, model = scene_of(tiny_split, 4), tiny_model.eval()
    x_adv = craft(model, SPARSE, scene.x[:4], scene.y[:4], seeded())
    found = defence_loss(model, SPARSE, DefenceConfig(loss=PLAIN), scene, x_adv, None)
    shown = torch.cat([x_adv, scene.x[4:]])
    torch.testing.assert_close(found.loss, F.cross_entropy(model(shown), scene.y, label_smoothing=0.1))
    assert found.memory == {}


def test_trades_shows_the_attacked_images_clean_as_well_and_costs_what_the_paper_says(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    scene, model = scene_of(tiny_split, 4), tiny_model.eval()
    x_adv = craft(model, SPARSE, scene.x[:4], scene.y[:4], seeded())
    config = DefenceConfig(loss=PLAIN, objective=Trades(beta=3.0))
    found = defence_loss(model, SPARSE, config, scene, x_adv, None)
    clean, attacked = model(scene.x), model(x_adv)
    expected = F.cross_entropy(clean, scene.y, label_smoothing=0.1) + 3.0 * divergence(clean[:4], attacked).sum() / 10
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.metrics["moved"], 3.0 * divergence(clean[:4], attacked).mean().detach())
    torch.testing.assert_close(found.metrics["accuracy"], (clean.argmax(1) == scene.y).float().mean())
    torch.testing.assert_close(found.metrics["accuracy_attacked"], (attacked.argmax(1) == scene.y[:4]).float().mean())


@pytest.mark.parametrize("twins", [False, True])
def test_the_detector_learns_which_of_the_shown_images_are_attacked(twins: bool, tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    scene, model = scene_of(tiny_split, 4), tiny_model.eval()
    x_adv = craft(model, SPARSE, scene.x[:4], scene.y[:4], seeded())
    weights = replace(PLAIN, anomaly_map=0.5, detection=0.2)
    config = DefenceConfig(loss=weights, objective=Trades()) if twins else DefenceConfig(loss=weights)
    found = defence_loss(model, SPARSE, config, scene, x_adv, None)
    clean = scene.x if twins else scene.x[4:]
    truth = detector_terms(model.trace(torch.cat([x_adv, clean])), SPARSE, changed_pixels(x_adv, scene.x[:4]))
    assert set(truth) == {"anomaly_map", "detection"}
    for name, value in truth.items():
        torch.testing.assert_close(found.metrics[name], value.detach())


def test_self_adaptive_labels_move_by_clean_answers_only_and_weigh_the_loss(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    soft = torch.rand(10, 2, generator=seeded(5))
    soft = soft / soft.sum(1, keepdim=True)
    scene, model = scene_of(tiny_split, 4, soft, momentum=0.9), tiny_model.eval()
    x_adv = craft(model, SPARSE, scene.x[:4], scene.y[:4], seeded())
    clean, attacked = model(scene.x).detach(), model(x_adv).detach()
    everywhere = 0.9 * soft + 0.1 * clean.softmax(1)

    def weighed(costs: Tensor, targets: Tensor) -> Tensor:
        weight = targets.amax(1)
        return (weight * costs).sum() / weight.sum()

    found = defence_loss(model, SPARSE, DefenceConfig(loss=PLAIN, objective=Trades(beta=2.0)), scene, x_adv, None)
    torch.testing.assert_close(found.memory["soft_labels"], everywhere)
    costs = F.cross_entropy(clean, everywhere, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(found.loss, weighed(costs, everywhere) + 2.0 * divergence(clean[:4], attacked).sum() / 10)

    found = defence_loss(model, SPARSE, DefenceConfig(loss=PLAIN), scene, x_adv, None)
    partly = torch.cat([soft[:4], everywhere[4:]])
    torch.testing.assert_close(found.memory["soft_labels"], partly)
    costs = F.cross_entropy(torch.cat([attacked, clean[4:]]), partly, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(found.loss, weighed(costs, partly))

    found = supervised_step(model, DefenceConfig(loss=PLAIN), scene)
    torch.testing.assert_close(found.memory["soft_labels"], everywhere)


def test_labels_are_remembered_by_the_image_they_belong_to(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    config = AdversarialTrainConfig(
        loop=LOOP, augment=STILL, loss=PLAIN, attacks=(), labels=SelfAdaptiveLabels(start=0.5), attacked_share=0.5
    )
    stage = AdversarialTraining(config, images=40)
    batch = batch_of(tiny_split)
    model = tiny_model.eval()
    stage.remember([stage.step(model, model, batch).memory])
    assert stage.labels.table is not None
    expected = 0.9 * F.one_hot(batch.y, 2) + 0.1 * model(batch.x).softmax(1).detach()
    torch.testing.assert_close(stage.labels.table[10:20], expected)
    assert not stage.labels.table[:10].any()
    assert not stage.labels.table[20:].any()
    assert AdversarialTraining(config, images=40).step(model, model, replace(batch, progress=0.4)).memory == {}


@pytest.mark.parametrize("mixed", [False, True])
def test_perturbed_weights_are_those_of_the_steps_own_loss_and_come_back(mixed: bool, tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    scene, model = scene_of(tiny_split, 4), tiny_model.eval()
    attack = PGDAttack(0.05, 0.02, 2, stop_when_fooled=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients, plain = [], 0.0
    for gamma in (0.0, 0.02):
        model.zero_grad()
        config = DefenceConfig(loss=PLAIN, awp=WeightPerturbation(gamma))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            output = defence_step(model, model, attack, config, scene, seeded(3))
        output.loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert (output.after_backward is None) == (gamma == 0)
        if output.after_backward is not None:
            assert float(output.loss.detach()) > plain + 1e-4, "the weights were moved to where the loss is greater"
            assert not torch.equal(model.classifier.weight, before["classifier.weight"])
            output.after_backward()
        plain = float(output.loss.detach())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_pass_that_fails_at_perturbed_weights_puts_them_back(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    passes = iter(range(100))
    trace = tiny_model.trace

    def failing(x: Tensor) -> object:
        if next(passes) == 1:  # the ascent's is the first
            raise torch.OutOfMemoryError("no memory")
        return trace(x)

    tiny_model.trace = failing  # type: ignore[method-assign,assignment]
    config = DefenceConfig(loss=PLAIN, awp=WeightPerturbation(0.05))
    with pytest.raises(torch.OutOfMemoryError):
        defence_step(tiny_model.eval(), tiny_model, SPARSE, config, scene_of(tiny_split, 4), seeded())
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())


class Counting(nn.Module):
    """Counts the passes each way through the first convolution."""

    def __init__(self, model: AMSDN) -> None:
        super().__init__()
        self.forwards = self.backwards = 0
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(self._seen)

    def _seen(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.forwards += 1
        if output.requires_grad:
            output.register_hook(self._back)

    def _back(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize(
    ("attack", "objective", "forwards", "backwards"),
    [
        (NFGSM(8 / 255, projected=False, stop_when_fooled=False), None, 2, 2),  # the attack's, the training pass
        (OneStepSparse(6).stepping(False), None, 2, 2),
        (OneStepSparse(6).stepping(False), Trades(), 3, 2),  # and the answer on the clean images
        (PGDAttack(num_steps=3, stop_when_fooled=False), None, 4, 4),
    ],
)
def test_what_a_step_costs(attack, objective, forwards, backwards, tiny_model: AMSDN, tiny_split: ArraySplit) -> None:  # type: ignore[no-untyped-def]
    count = Counting(tiny_model)
    config = DefenceConfig(loss=PLAIN) if objective is None else DefenceConfig(loss=PLAIN, objective=objective)
    defence_step(tiny_model.train(), tiny_model, attack, config, scene_of(tiny_split, 5), seeded()).loss.backward()  # type: ignore[no-untyped-call]
    assert (count.forwards, count.backwards) == (forwards, backwards)


EVERYTHING = AdversarialTrainConfig(
    loop=LOOP,
    augment=Augment(flip=True, shift=1),
    attacks=(PatchSizes((3, 4), num_steps=2), OneStepSparse(6), PixelCounts(2, 6, num_steps=1), NFGSM(8 / 255, projected=False)),
    attacked_share=0.4,
    clean_start=0.2,
    mix=ErrorProportional(refresh=2),
    objective=Trades(),
    labels=SelfAdaptiveLabels(start=0.4),
    awp=WeightPerturbation(5e-3),
    views=CertifiableViews(
        noised=0.2,
        masked=0.2,
        copies=2,
        consistency=2.0,
        entropy=0.5,
        smooth_adversary=SmoothAdversary(0.25, num_steps=2, warmup=0.5),
        unmasked_pull=1.0,
        cutouts=(GreedyCutout(4, 2, candidates=2),),
    ),
)


def weights_after(config: AdversarialTrainConfig, model: AMSDNConfig, split: ArraySplit, folder: Path, die_at: int) -> dict[str, Tensor]:
    """Train from the same start, dying once in the step of that number (with -1, never), and go on."""
    for attempt in range(2):
        torch.manual_seed(3)
        stage = AdversarialTraining(config, len(split))
        step, count = stage.step, iter(range(1000))

        def dying(*args, step=step, count=count, attempt=attempt):  # type: ignore[no-untyped-def]
            if next(count) == die_at and attempt == 0:
                raise KeyboardInterrupt
            return step(*args)

        stage.step = dying  # type: ignore[method-assign]
        try:
            return train(stage, AMSDN.from_config(model), split, config.loop, folder).model.state_dict()
        except KeyboardInterrupt:
            continue
    raise AssertionError


@pytest.mark.parametrize("mixed", [False, True])
def test_with_every_ingredient_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(
    mixed: bool, tiny_config: AMSDNConfig, tiny_split: ArraySplit, tmp_path: Path
) -> None:
    config = replace(EVERYTHING, loop=replace(LOOP, mixed_precision=mixed))
    whole = weights_after(config, tiny_config, tiny_split, tmp_path / "whole", -1)
    assert all(bool(v.isfinite().all()) for v in whole.values())
    cut = weights_after(config, tiny_config, tiny_split, tmp_path / "cut", 3)
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_finetuning_takes_every_ingredient_too(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    shared = {name: getattr(EVERYTHING, name) for name in ("loop", "attacks", "objective", "labels", "awp", "views")}
    stage = Finetuning(FinetuneConfig(**shared), images=40)
    assert isinstance(stage.config.mix, ErrorProportional)
    teacher = AMSDN.from_config(tiny_model.config).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [stage.step(tiny_model.train(), teacher, batch_of(tiny_split, seed=seed)) for seed in range(1)]
    (output,) = outputs
    assert output.loss.dtype == torch.float32
    output.loss.backward()  # type: ignore[no-untyped-call]
    assert output.after_backward is not None
    output.after_backward()
    assert {"attacks_met", "attack_errors", "index", "soft_labels"} == set(output.memory)
    assert output.memory["soft_labels"].dtype == torch.float32


def test_training_pays_for_one_view_of_a_model_that_asks_several(tiny_config: AMSDNConfig, tiny_split: ArraySplit) -> None:
    model = AMSDN.from_config(replace(tiny_config, consistency_samples=4)).train()
    asked: list[int] = []
    model.backbone.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    stage = AdversarialTraining(AdversarialTrainConfig(attacks=(), augment=STILL))
    stage.step(model, AMSDN.from_config(tiny_config).eval(), batch_of(tiny_split))
    assert len(asked) == 1


def test_cutting_a_trace_keeps_the_first_images_of_every_field(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    x = tiny_split.fetch(torch.arange(6))[0]
    whole, part = tiny_model.eval().trace(x), tiny_model.trace(x[:2])
    cut = first_of(whole, 2)
    torch.testing.assert_close(cut.logits, part.logits)
    for ours, theirs in zip(cut.evidence, part.evidence, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(InputError, match="objective: TRADES"):
        AdversarialTrainConfig(attacks=(PGDAttack(random_start=False),), objective=Trades())
    labels = SelfAdaptiveLabels(start=0.5)
    with pytest.raises(InputError, match="train: labels follow answers to clean images"):
        AdversarialTrainConfig(attacks=(SPARSE,), attacked_share=1.0, labels=labels)
    AdversarialTrainConfig(attacks=(SPARSE,), attacked_share=1.0, labels=labels, objective=Trades())
    AdversarialTrainConfig(attacks=(), attacked_share=1.0, labels=labels)
