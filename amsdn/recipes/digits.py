"""The demo: scikit-learn's digits at 32x32, two CPU cores, minutes."""

from dataclasses import replace

from amsdn.attacks import Attack, PatchPGD, PGDAttack, PGDL2Attack, SparsePGD
from amsdn.data.augment import Augment
from amsdn.evaluation.smoothing_attack import RecheckConfig
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes.defences import DefenceAttacks, PatchDefence, PixelDefence
from amsdn.recipes.recipe import Recipe
from amsdn.recipes.suites import quick_suite
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.loop import LoopConfig
from amsdn.training.pretrain_ssrt import PretrainConfig
from amsdn.training.views import CertifiableViews, GreedyCutout, PixelParts

HEADLINE = {"patch": 8, "sparse": 20, "linf": 8 / 255, "l2": 0.5}
AUGMENT = Augment(flip=False, shift=2)  # a mirrored digit is another sign


def digits_demo() -> Recipe:
    """Everything once, small: what ``make demo`` runs."""
    model = AMSDNConfig(num_classes=10, variant="compact", width=16)
    patch: Attack = PatchPGD(size=8, num_steps=6, alpha=0.2, stop_when_fooled=False)
    patch_longer: Attack = PatchPGD(size=8, num_steps=8, alpha=0.15, stop_when_fooled=False)
    sparse: Attack = SparsePGD(k=20, num_steps=5, stop_when_fooled=False)
    return Recipe(
        name="digits-demo",
        about="digits, compact network of width 16, a CPU",
        cost="5 minutes of training, fifteen to thirty for everything, two CPU cores (measured)",
        expected="clean 99, patch 8x8 43 under attack, 20 pixels 81, certified 8x8 57, certified l2 .25 95 (results/digits-demo.json)",
        data="digits",
        model=model,
        control_model=replace(model, fpn=False, attention=False, purification=False),
        control=AdversarialTrainConfig(loop=LoopConfig(epochs=25, learning_rate=4e-3), augment=AUGMENT, attacks=()),
        pretrain=PretrainConfig(loop=LoopConfig(epochs=4, learning_rate=4e-3), augment=AUGMENT),
        train=AdversarialTrainConfig(
            loop=LoopConfig(epochs=30, learning_rate=4e-3),
            augment=AUGMENT,
            attacks=(patch, sparse),
            views=CertifiableViews(noised=0.0, masked=0.25, ablated=0.0, cutouts=(GreedyCutout(patch=8, masks_per_axis=4, candidates=1),)),
        ),
        finetune=FinetuneConfig(
            loop=LoopConfig(epochs=8, learning_rate=3e-4),
            augment=AUGMENT,
            attacked_share=0.5,
            views=CertifiableViews(
                noised=0.15,
                masked=0.15,
                ablated=0.05,
                consistency=2.0,
                cutouts=(GreedyCutout(patch=8, masks_per_axis=4, candidates=4),),
                parts=PixelParts(grids=((6, 6),)),
            ),
            attacks=(
                PGDAttack(epsilon=8 / 255, alpha=3 / 255, num_steps=4, stop_when_fooled=False),
                PGDL2Attack(epsilon=0.75, alpha=0.3, num_steps=4, stop_when_fooled=False),
                patch_longer,
                sparse,
            ),
        ),
        attacks=quick_suite(patches=(4, 6, 8), pixels=(5, 10, 20), headline=HEADLINE, steps=50, targets=3),
        headline=HEADLINE,
        samples=150,
        certified_samples=60,
        smoothing=SmoothingConfig(sigma=0.25, n=2000),
        recheck=RecheckConfig(steps=5, draws=4, n=200),
        patch=PatchDefence(size=8, masks_per_axis=4),
        pixels=PixelDefence(rows=6, columns=6),
        defence_attacks=DefenceAttacks(samples=10, steps=10, queries=30, pixels=(4, 12)),
    )
