"""No part of a step waits for a GPU: guarded on a CPU by looking at every operation that a step calls (see ``waits``)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_stages import LOOP, make_stage
from torch import Tensor
from waits import waits

from amsdn.attacks import NFGSM, Attack, EvadeDetector, PatchPGD, PGDAttack, PGDL2Attack, SparsePGD
from amsdn.attacks.base import Victim
from amsdn.attacks.losses import Goal
from amsdn.data import ArraySplit, Augment
from amsdn.errors import ThreatViolation
from amsdn.models.amsdn import AMSDN, AMSDNConfig
from amsdn.training.adversarial_train import AdversarialTrainConfig, AdversarialTraining
from amsdn.training.attack_ranges import OneStepSparse, TrainingAttack
from amsdn.training.awp import WeightPerturbation
from amsdn.training.ranks import ALONE
from amsdn.training.run import Run
from amsdn.training.self_adaptive import SelfAdaptiveLabels
from amsdn.training.smooth_adversary import SmoothAdversary
from amsdn.training.stage import Stage
from amsdn.training.trades import Trades
from amsdn.training.views import CertifiableViews, GreedyCutout, PixelParts

VIEWS = CertifiableViews(
    noised=0.2,
    masked=0.2,
    ablated=0.1,
    consistency=1.0,
    entropy=0.5,
    unmasked_pull=1.0,
    cutouts=(GreedyCutout(4, 2, candidates=2), GreedyCutout(4, 2, pairs=2)),
    parts=PixelParts(((2, 2), (2, 3))),
    smooth_adversary=SmoothAdversary(0.2, 1),
)
PATCH: Attack = PatchPGD((3, 4), 2, 0.25, "full", candidates=2, stop_when_fooled=False)
SPARSE: Attack = SparsePGD(6, 4, patience=2, stop_when_fooled=False)
ATTACKS: tuple[TrainingAttack, ...] = (
    PatchPGD(4, 2, 0.25, stop_when_fooled=False),
    PATCH,
    SPARSE,
    OneStepSparse(3),
    PGDAttack(num_steps=2, stop_when_fooled=False),
    PGDL2Attack(num_steps=2, stop_when_fooled=False),
    NFGSM(),
    EvadeDetector(PATCH),
    EvadeDetector(SPARSE, gradients="orthogonal"),
)


def waits_of(stage: Stage, model: AMSDN, split: ArraySplit, folder: Path, steps: int = 1) -> list[str]:
    """What ``steps`` steps wait for, beside the look at the loss and the CPU's own optimizer."""
    run = Run(stage, model, split, replace(LOOP, epochs=1), folder, "settings", ALONE)
    run.optimizer.step = lambda: None  # type: ignore[method-assign,assignment,return-value]
    run._look = lambda: None  # type: ignore[method-assign]
    with waits() as found:
        for _, step in zip(range(steps), run.steps(), strict=False):
            sums, _ = run.gradient(step, [])
            run.update(sums)
    assert len(run.checks) >= 1 or not getattr(stage.config, "attacks", ()), "an attack was not checked"  # type: ignore[attr-defined]
    return found


def training(attack: TrainingAttack, **settings: object) -> AdversarialTraining:
    config = AdversarialTrainConfig(loop=LOOP, augment=Augment(cutout=3), attacks=(attack,), clean_start=0, **settings)  # type: ignore[arg-type]
    return AdversarialTraining(config, 40)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_a_step_of_a_stage_waits_for_nothing(name: str, tiny_model: AMSDN, tiny_split: ArraySplit, tmp_path: Path) -> None:
    assert waits_of(make_stage(name, tiny_model), tiny_model, tiny_split, tmp_path) == []


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)
def test_a_step_against_an_attack_waits_for_nothing(
    attack: TrainingAttack, tiny_model: AMSDN, tiny_split: ArraySplit, tmp_path: Path
) -> None:
    assert waits_of(training(attack), tiny_model, tiny_split, tmp_path) == []


def test_a_step_with_every_ingredient_waits_for_nothing(tiny_config: AMSDNConfig, tiny_split: ArraySplit, tmp_path: Path) -> None:
    model = AMSDN.from_config(replace(tiny_config, consistency_samples=4, bounded_evidence=True))
    ingredients = {"objective": Trades(), "labels": SelfAdaptiveLabels(0.0), "awp": WeightPerturbation(5e-3), "views": VIEWS}
    assert waits_of(training(SPARSE, attacked_share=0.4, **ingredients), model, tiny_split, tmp_path, steps=2) == []


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: int(x.argmax()),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
        lambda x: (x > 0).nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x[x.argmax()],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.as_tensor(1.0, device=x.device),
        lambda x: torch.zeros(2).repeat_interleave((x[:2] > 0).long()),
    ],
)
def test_the_guard_sees_what_waits(waiting) -> None:  # type: ignore[no-untyped-def]
    with waits() as found:
        waiting(torch.arange(-2.0, 3.0))
    assert found


def test_the_guard_lets_pass_what_does_not_wait() -> None:
    x = torch.arange(-2.0, 3.0)
    with waits() as found:
        x[x.long().abs()], torch.where(x > 0, x, 0), x.repeat_interleave(2), torch.as_tensor(x, device="cpu"), torch.tensor([1.0])
    assert found == []


class Escaping(PGDAttack):
    """Leaves the ball."""

    def perturb(self, victim: Victim, x: Tensor, goal: Goal, generator: torch.Generator) -> Tensor:
        return x + 0.5


def test_an_attack_that_breaks_its_threat_is_noticed_late_but_before_the_weights_move(
    tiny_model: AMSDN, tiny_split: ArraySplit, tmp_path: Path
) -> None:
    run = Run(training(Escaping()), tiny_model, tiny_split, LOOP, tmp_path, "settings", ALONE)
    before = {name: value.clone() for name, value in tiny_model.named_parameters()}
    sums, _ = run.gradient(next(run.steps()), [])
    with pytest.raises(ThreatViolation, match=r"Escaping: sample 0 of the batch is outside linf 8/255: it spends 0\.5"):
        run.update(sums)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.named_parameters())
