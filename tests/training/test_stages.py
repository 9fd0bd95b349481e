"""The three stages on a tiny network: they learn what they claim to, from what they claim to, and resume exactly."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from amsdn.attacks import Attack, PatchPGD, PGDAttack, SparsePGD
from amsdn.data import ArraySplit, Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.training.adversarial_train import AdversarialTrainConfig, AdversarialTraining
from amsdn.training.defence import craft
from amsdn.training.finetune_attacks import FinetuneConfig, Finetuning
from amsdn.training.loop import Batch, LoopConfig, Stage, train
from amsdn.training.pretrain_ssrt import SSRT, InstanceClassifier, PretrainConfig
from amsdn.training.views import CertifiableViews, GreedyCutout, PixelParts

LOOP = LoopConfig(epochs=2, batch_size=10, learning_rate=1e-3, checkpoint_every_s=0)
AUGMENT = Augment(flip=True, shift=1)
PATCH: Attack = PatchPGD(size=4, num_steps=2, alpha=0.25, stop_when_fooled=False)
SPARSE: Attack = SparsePGD(k=6, num_steps=2, stop_when_fooled=False)
DENSE: Attack = PGDAttack(epsilon=8 / 255, alpha=4 / 255, num_steps=2, stop_when_fooled=False)

VIEWS = CertifiableViews(
    noised=0.2, masked=0.2, ablated=0.1, consistency=2.0, cutouts=(GreedyCutout(4, 2, candidates=2),), parts=PixelParts(((2, 2),))
)


def make_stage(name: str, model: AMSDN) -> Stage:
    if name == "pretrain":
        return SSRT(PretrainConfig(loop=LOOP, augment=AUGMENT, attacks=(PATCH, SPARSE), projection=8), model)
    if name == "train":
        return AdversarialTraining(AdversarialTrainConfig(loop=LOOP, augment=AUGMENT, attacks=(PATCH, SPARSE), clean_start=0))
    return Finetuning(FinetuneConfig(loop=LOOP, augment=AUGMENT, attacks=(PATCH, SPARSE, DENSE), views=VIEWS))


def batch_of(split: ArraySplit, seed: int = 0) -> Batch:
    x, y = split.fetch(torch.arange(10))
    return Batch(x, y, torch.arange(10), torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed), 0.5)


def weights_after(name: str, config: AMSDNConfig, split: ArraySplit, folder: Path, stop_after: int | None = None) -> dict[str, Tensor]:
    """Run a stage from the same start; with ``stop_after`` it dies there once, without saving, and is run again."""
    for attempt in range(2 if stop_after is not None else 1):
        torch.manual_seed(3)
        model = AMSDN.from_config(config)
        stage = make_stage(name, model)
        if attempt == 0 and stop_after is not None:
            original, count = stage.step, iter(range(1000))

            def dying(*args, original=original, count=count):  # type: ignore[no-untyped-def]
                if next(count) == stop_after:
                    raise KeyboardInterrupt
                return original(*args)

            stage.step = dying  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                train(stage, model, split, LOOP, folder)
        else:
            return train(stage, model, split, LOOP, folder).model.state_dict()
    raise AssertionError


@pytest.mark.parametrize("name", ["pretrain", "train", "finetune"])
def test_every_stage_resumes_bit_for_bit(name: str, tiny_config: AMSDNConfig, tiny_split: ArraySplit, tmp_path: Path) -> None:
    whole = weights_after(name, tiny_config, tiny_split, tmp_path / "whole")
    cut = weights_after(name, tiny_config, tiny_split, tmp_path / "cut", stop_after=5)
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


@pytest.mark.parametrize("name", ["pretrain", "train", "finetune"])
def test_every_trained_part_receives_a_gradient(name: str, tiny_config: AMSDNConfig, tiny_split: ArraySplit) -> None:
    tiny_model = AMSDN.from_config(replace(tiny_config, purification_threshold=0.02))  # the untrained anomaly: some gates are open
    stage, teacher = make_stage(name, tiny_model), AMSDN.from_config(tiny_model.config).eval()
    reached: set[str] = set()
    for seed in range(6):  # several, since a batch meets one attack
        tiny_model.zero_grad()
        stage.step(tiny_model.train(), teacher, batch_of(tiny_split, seed)).loss.backward()
        reached |= {n for n, p in tiny_model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    parts = ["backbone", "pyramid", "attention", "purifier.heads", "purifier.denoisers", "detector"]
    parts += [] if name == "pretrain" else ["classifier"]
    missed = [part for part in parts if not any(n.startswith(part) for n in reached)]
    assert not missed


def test_pretraining_uses_no_labels(tiny_config: AMSDNConfig, tiny_split: ArraySplit, tmp_path: Path) -> None:
    shuffled = ArraySplit(tiny_split.images, torch.zeros_like(tiny_split.labels))
    a = weights_after("pretrain", tiny_config, tiny_split, tmp_path / "a")
    b = weights_after("pretrain", tiny_config, shuffled, tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_instances_are_recognised_by_their_own_embedding(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    x = tiny_split.fetch(torch.arange(10))[0]
    model = tiny_model.eval()
    bank = model.trace(x).embedding.detach()
    assert (InstanceClassifier(model, torch.nn.Identity(), bank, 0.1)(x).argmax(1) == torch.arange(10)).all()


def test_crafting_happens_in_eval_mode_and_gives_train_mode_back(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    x, y = tiny_split.fetch(torch.arange(10))
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    x_adv = craft(tiny_model.train(), PATCH, x, y, torch.Generator().manual_seed(0))
    assert tiny_model.training
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items()), "batch statistics moved while attacking"
    assert PATCH.threat.contains(x_adv, x).all()
    assert all(p.grad is None and p.requires_grad for p in tiny_model.parameters())


def test_finetuning_keeps_the_batch_statistics_of_adversarial_training(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    before = {k: v.clone() for k, v in tiny_model.named_buffers()}
    stage = make_stage("finetune", tiny_model)
    for seed in range(3):
        stage.step(tiny_model.train(), AMSDN.from_config(tiny_model.config).eval(), batch_of(tiny_split, seed))
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.named_buffers())


def test_without_attacks_training_is_plain_supervision(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    stage = AdversarialTraining(AdversarialTrainConfig(loop=LOOP, augment=AUGMENT, attacks=()))
    output = stage.step(tiny_model.train(), tiny_model, batch_of(tiny_split))
    assert set(output.metrics) == {"accuracy"}


def test_the_clean_start_attacks_nothing_and_what_follows_does(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    stage = AdversarialTraining(AdversarialTrainConfig(loop=LOOP, augment=AUGMENT, attacks=(PATCH,), clean_start=0.6))
    batch = batch_of(tiny_split)
    assert "accuracy_attacked" not in stage.step(tiny_model.train(), tiny_model, batch).metrics
    assert "accuracy_attacked" in stage.step(tiny_model.train(), tiny_model, replace(batch, progress=0.6)).metrics


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_adversarial_training_shows_views_before_and_beside_its_attacks(tiny_model: AMSDN, tiny_split: ArraySplit, progress: float) -> None:
    stage = AdversarialTraining(
        AdversarialTrainConfig(loop=LOOP, augment=AUGMENT, attacks=(PATCH,), attacked_share=0.3, views=VIEWS, clean_start=0.5)
    )
    output = stage.step(tiny_model.train(), tiny_model, replace(batch_of(tiny_split), progress=progress))
    assert {"accuracy_noised", "accuracy_masked", "accuracy_ablated", "noise_consistency", "accuracy"} <= set(output.metrics)
    assert ("accuracy_attacked" in output.metrics) == (progress > 0.5)
    assert bool(output.loss.isfinite())
    output.loss.backward()


class Blackened(Augment):
    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(x)


class Noticing(GreedyCutout):
    seen: ClassVar[list[Tensor]] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(x)
        return x


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_views_are_of_augmented_images(name: str, tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    views = CertifiableViews(masked=0.3, cutouts=(Noticing(4, 2),))
    stages = {
        "train": AdversarialTraining(AdversarialTrainConfig(loop=LOOP, augment=Blackened(), attacks=(), views=views)),
        "finetune": Finetuning(FinetuneConfig(loop=LOOP, augment=Blackened(), attacks=(PATCH,), views=views)),
    }
    Noticing.seen.clear()
    stages[name].step(tiny_model.train(), tiny_model, batch_of(tiny_split))
    assert [x.shape for x in Noticing.seen] == [(3, 3, 16, 16)]
    assert not Noticing.seen[0].any()


def test_shares_that_exceed_a_batch_are_refused() -> None:
    views = CertifiableViews(noised=0.3, masked=0.3)
    AdversarialTrainConfig(attacked_share=0.4, views=views)
    AdversarialTrainConfig(attacks=(), views=views)
    with pytest.raises(InputError, match="train: attacked_share"):
        AdversarialTrainConfig(attacked_share=0.41, views=views)
    with pytest.raises(InputError, match="finetune: some images must be attacked and some left clean"):
        FinetuneConfig(attacked_share=0.4, views=views)
    with pytest.raises(InputError, match="finetune: some images must be attacked"):
        FinetuneConfig(attacked_share=0.0)
    with pytest.raises(InputError, match="finetune: needs"):
        FinetuneConfig(attacks=())


def test_a_step_changes_nothing_and_finetuning_remembers_the_error_of_the_attack_it_drew(tiny_model: AMSDN, tiny_split: ArraySplit) -> None:
    stage = make_stage("finetune", tiny_model)
    assert isinstance(stage, Finetuning)
    output = stage.step(tiny_model.train(), tiny_model, batch_of(tiny_split))
    assert stage.sampler.errors.tolist() == [0.5, 0.5, 0.5], "a step must not change the stage"
    stage.remember([output.memory])
    met = output.memory["attacks_met"].bool()
    expected = 0.95 * 0.5 + 0.05 * (1 - float(output.metrics["accuracy_attacked"]))
    assert int(met.sum()) == 1
    torch.testing.assert_close(stage.sampler.errors, torch.where(met, expected, 0.5))
