"""CIFAR-10 recipes for one GPU: the flagship against patches and pixels, randomized smoothing, and all threats at once.

Each comes in two sizes, for thirty minutes of training on an H200 and for ten. Schedules are fitted to the step time that is
measured when a stage starts (``Recipe.budget``), so the recipes run elsewhere too, with another number of steps. Nobody has run
them on a GPU yet: what they state as expected is what they have to beat.
"""

from dataclasses import replace

from amsdn.attacks import APGDL1Attack, PatchPGD, PGDAttack, PGDL2Attack, SparsePGD
from amsdn.data.augment import Augment
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes.cifar10 import AUGMENT
from amsdn.recipes.recipe import BudgetShares, Recipe
from amsdn.recipes.suites import quick_suite
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.attack_mix import ErrorProportional
from amsdn.training.attack_ranges import OneStepSparse, PatchSizes, PixelCounts
from amsdn.training.awp import WeightPerturbation
from amsdn.training.defence import DefenceLoss
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.loop import LoopConfig
from amsdn.training.pretrain_ssrt import PretrainConfig
from amsdn.training.self_adaptive import SelfAdaptiveLabels
from amsdn.training.trades import Trades
from amsdn.training.views import CertifiableViews, GreedyCutout, PixelParts, SmoothAdversary

HEADLINE = {"patch": 5, "sparse": 20, "linf": 8 / 255, "l2": 0.5}
MODEL = AMSDNConfig(num_classes=10, variant="preact18", fpn_channels=64)
PLAIN = replace(MODEL, fpn=False, attention=False, purification=False)
LOOP = LoopConfig(
    epochs=60, batch_size=512, optimizer="sgd", learning_rate=0.2, weight_decay=5e-4, clip_norm=5.0, ema_decay=0.999, compile=True
)
SLOW = replace(LOOP, epochs=12, learning_rate=0.02, warmup=0.02)
MASKS = (GreedyCutout(5, masks_per_axis=6, candidates=4), GreedyCutout(5, masks_per_axis=3, candidates=1))


def cifar10_patch_sparse() -> Recipe:
    """The flagship: patches and pixels, no dense norm, which would cost clean accuracy and buy nothing here."""
    return Recipe(
        name="cifar10-patch-sparse",
        about="CIFAR-10, PreAct ResNet-18, the flagship against patches and few pixels",
        cost="30 minutes of training on one H200, by budget; not run yet",
        expected="to beat: clean 92, certified 5x5 70, patch 8x8 70 and 4x4 85 under attack, 20 pixels 79.5, 5 pixels 85 (FIELD.md; nobody has measured this recipe)",
        budget="30min",
        budget_shares=BudgetShares(pretrain=0.05, train=0.75, finetune=0.2),
        data="cifar10",
        model=MODEL,
        control_model=PLAIN,
        control=AdversarialTrainConfig(loop=replace(LOOP, epochs=30), augment=AUGMENT, attacks=()),
        pretrain=PretrainConfig(loop=replace(LOOP, epochs=3, learning_rate=0.1), augment=AUGMENT),
        train=AdversarialTrainConfig(
            loop=LOOP,
            augment=AUGMENT,
            # Two of three batches meet pixels: one step costs a fifth of a patch's five with their moves.
            attacks=(PatchSizes((4, 5, 6, 8), num_steps=5), OneStepSparse(k=120), OneStepSparse(k=60)),
            attacked_share=0.4,
            clean_start=0.1,
            objective=Trades(beta=6.0, climb_divergence=False),
            labels=SelfAdaptiveLabels(start=0.5),
            views=CertifiableViews(masked=0.35, cutouts=MASKS, unmasked_pull=1.0),
        ),
        finetune=FinetuneConfig(
            loop=SLOW,
            augment=AUGMENT,
            attacks=(
                PatchSizes((5, 8), num_steps=12, alpha=0.15),
                PatchPGD(4, num_steps=20, alpha=0.1, candidates=4, stop_when_fooled=False),
                SparsePGD(k=60, num_steps=12, patience=10, stop_when_fooled=False),
                PixelCounts(5, 40, num_steps=12),
            ),
            attacked_share=0.4,
            mix=ErrorProportional(),
            views=CertifiableViews(
                noised=0.08, masked=0.3, ablated=0.07, sigmas=(0.12,), cutouts=MASKS, unmasked_pull=1.0, parts=PixelParts(((6, 6),))
            ),
        ),
        attacks=quick_suite(patches=(2, 4, 5, 8), pixels=(5, 10, 20), headline=HEADLINE, steps=100, targets=9),
        headline=HEADLINE,
        samples=1000,
        certified_samples=1000,
        smoothing=SmoothingConfig(sigma=0.12),
    )


def cifar10_smoothing() -> Recipe:
    """For randomized smoothing at small radii: Gaussian noise of .12, copies that agree, and an adversary among them.

    No purification: noise everywhere is nothing to point at. The adversary's ten steps on four copies cost thirty times a plain
    step, so the ten-minute recipe leaves it out and relies on agreement alone (Jeong and Shin 2020).
    """
    views = CertifiableViews(
        noised=0.95, sigmas=(0.12,), copies=4, consistency=10.0, entropy=0.5, smooth_adversary=SmoothAdversary(64 / 255, 10)
    )
    plain = replace(cifar10_patch_sparse(), model=PLAIN, control_model=PLAIN)
    return replace(
        plain,
        name="cifar10-smoothing",
        about="CIFAR-10, PreAct ResNet-18, for certified l2 by randomized smoothing at sigma .12",
        cost="30 minutes of training on one H200, by budget; not run yet",
        expected="to beat: certified r=.25 74, r=.5 59 (FIELD.md; nobody has measured this recipe)",
        budget_shares=BudgetShares(pretrain=0.02, train=0.93, finetune=0.05),
        train=replace(plain.control, loop=LOOP, views=views, loss=DefenceLoss(label_smoothing=0.0)),
        finetune=FinetuneConfig(
            loop=replace(SLOW, learning_rate=2e-3),
            augment=AUGMENT,
            attacks=(PGDL2Attack(epsilon=0.25, alpha=0.1, num_steps=4, stop_when_fooled=False),),
            attacked_share=0.05,
            views=replace(views, noised=0.9, smooth_adversary=SmoothAdversary()),
        ),
        smoothing=SmoothingConfig(sigma=0.12),
        certificates=("l2",),
    )


def cifar10_allround() -> Recipe:
    """All four threats and noise in one set of weights: Linf adversarial training first, then a mix in proportion to running error."""
    augment = Augment(flip=True, shift=4, cutout=0)
    return replace(
        cifar10_patch_sparse(),
        name="cifar10-allround",
        about="CIFAR-10, PreAct ResNet-18, against Linf, L2, patches, pixels and noise at once",
        cost="30 minutes of training on one H200, by budget; not run yet",
        expected="to beat: AutoAttack Linf 8/255 50 to 53, all four threats at once 40 (FIELD.md; nobody has measured this recipe)",
        budget_shares=BudgetShares(pretrain=0.05, train=0.7, finetune=0.25),
        train=AdversarialTrainConfig(
            loop=replace(LOOP, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0),
            loss=DefenceLoss(label_smoothing=0.15),
            augment=augment,
            attacks=(PGDAttack(epsilon=8 / 255, alpha=2 / 255, num_steps=7, stop_when_fooled=False),),
            attacked_share=1.0,
            clean_start=0.03,
            awp=WeightPerturbation(gamma=5e-3),
        ),
        finetune=FinetuneConfig(
            loop=replace(SLOW, optimizer="adamw", learning_rate=1e-4, weight_decay=0.05, clip_norm=1.0),
            augment=augment,
            attacks=(
                PGDAttack(epsilon=8 / 255, alpha=2 / 255, num_steps=10, stop_when_fooled=False),
                APGDL1Attack(epsilon=12.0, num_steps=10, stop_when_fooled=False),
                PGDL2Attack(epsilon=0.5, alpha=0.1, num_steps=10, stop_when_fooled=False),
                PatchPGD(4, num_steps=20, alpha=0.1, candidates=4, stop_when_fooled=False),
                SparsePGD(k=30, num_steps=20, patience=10, stop_when_fooled=False),
            ),
            attacked_share=0.6,
            mix=ErrorProportional(),
            views=CertifiableViews(
                noised=0.2, masked=0.1, ablated=0.05, sigmas=(0.12, 0.25), consistency=10.0, cutouts=MASKS, parts=PixelParts(((6, 6),))
            ),
        ),
        smoothing=SmoothingConfig(sigma=0.25),
    )


def in_ten_minutes(recipe: Recipe) -> Recipe:
    """The same for ten minutes of training: shorter memories of the averages, single candidates for masks, and no smooth adversary."""
    quick = (GreedyCutout(5, masks_per_axis=6, candidates=1), GreedyCutout(5, masks_per_axis=3, candidates=1))

    def lighter(views: CertifiableViews) -> CertifiableViews:
        copies = None if views.smooth_adversary.epsilon else views.copies
        return replace(views, cutouts=quick, smooth_adversary=SmoothAdversary(), copies=copies)

    return replace(
        recipe,
        name=f"{recipe.name}-10min",
        about=f"{recipe.about}, in ten minutes",
        cost="10 minutes of training on one H200, by budget; not run yet",
        expected=f"less than {recipe.name}; nobody has measured it",
        budget="10min",
        train=replace(recipe.train, loop=replace(recipe.train.loop, ema_decay=0.998), views=lighter(recipe.train.views)),
        finetune=replace(recipe.finetune, views=lighter(recipe.finetune.views)),
    )
