"""CIFAR-10 recipes."""

from dataclasses import replace

from amsdn.attacks import EvadeDetector, PatchPGD, SparsePGD
from amsdn.data.augment import Augment
from amsdn.evaluation.smoothing_attack import RecheckConfig
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes.recipe import Recipe
from amsdn.recipes.suites import quick_suite
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.attack_mix import ErrorProportional
from amsdn.training.attack_ranges import OneStepSparse, PatchSizes, PixelCounts
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.loop import LoopConfig
from amsdn.training.pretrain_ssrt import PretrainConfig
from amsdn.training.views import CertifiableViews, GreedyCutout, PixelParts

HEADLINE = {"patch": 5, "sparse": 10, "linf": 2 / 255, "l2": 0.25}
AUGMENT = Augment(flip=True, shift=4)


def cifar10_cpu() -> Recipe:
    """Patches and pixels on two CPU cores: masks of the patch certificate, attacked images, and attacks that avoid the detector.

    The parts that did not earn their cost at this size are off (docs/training/ablations.md). The answers to masked images serve the
    certificate and consistency alike; few gradient steps an attack are what a CPU affords.
    """
    model = AMSDNConfig(num_classes=10, variant="compact", width=32, fpn=False, attention=False, bounded_evidence=True)
    patch = PatchPGD(size=5, num_steps=2, alpha=0.5, move="never", stop_when_fooled=False)
    sparse = SparsePGD(k=60, num_steps=2, alpha=0.5, stop_when_fooled=False)
    loop = LoopConfig(epochs=30, batch_size=256, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, clip_norm=5.0)
    certified = GreedyCutout(5, masks_per_axis=6, pairs=2)
    masks = (certified, certified, GreedyCutout(5, masks_per_axis=3, candidates=1))
    return Recipe(
        name="cifar10-cpu",
        about="CIFAR-10, compact network against patches and pixels, two CPU cores",
        cost="106 minutes for the train and finetune stages on one core (measured)",
        expected="clean 91.4, certified 5x5 56.4 (10,000 and 1,000 test images); the shipped weights had 20 epochs more (an hour): 92.3, 58.2 (results/cifar10-cpu.json)",
        data="cifar10",
        model=model,
        control_model=replace(model, fpn=False, attention=False, purification=False, bounded_evidence=False),
        control=AdversarialTrainConfig(loop=replace(loop, epochs=8), augment=AUGMENT, attacks=()),
        pretrain=PretrainConfig(loop=LoopConfig(epochs=0.5, batch_size=256), augment=AUGMENT),
        train=AdversarialTrainConfig(
            loop=loop,
            augment=AUGMENT,
            attacks=(
                PatchSizes((4, 5, 6, 8), num_steps=2, alpha=0.5, move="never"),
                EvadeDetector(patch),
                OneStepSparse(k=60),
                EvadeDetector(sparse),
            ),
            attacked_share=0.25,
            clean_start=0.1,
            views=CertifiableViews(masked=0.6, cutouts=masks),
        ),
        finetune=FinetuneConfig(
            loop=LoopConfig(epochs=4, batch_size=256, learning_rate=4e-4),
            augment=AUGMENT,
            attacks=(
                PatchSizes((5, 8), num_steps=5, alpha=0.3),
                EvadeDetector(replace(patch, num_steps=5, alpha=0.3)),
                PixelCounts(5, 60, num_steps=5),
                EvadeDetector(replace(sparse, num_steps=5)),
            ),
            attacked_share=0.3,
            mix=ErrorProportional(),
            views=CertifiableViews(masked=0.5, cutouts=masks),
        ),
        attacks=quick_suite(patches=(2, 4, 5, 8), pixels=(1, 5, 10, 20), headline=HEADLINE, steps=100, targets=3),
        headline=HEADLINE,
        samples=1000,
        certified_samples=1000,
        smoothing=SmoothingConfig(sigma=0.25, n=10_000),
        recheck=RecheckConfig(steps=10, draws=8, n=500),
        certificates=("patch",),
    )


def cifar10_certified() -> Recipe:
    """A model to certify, on one CPU core: ``amsdn train cifar10-certified`` is all it needs.

    No attacks and no detector: every image serves a certificate instead, as noise, under two masks of the sets that the patch
    certificate will use (6 and 3 masks an axis), or as one part of its pixels. Attention and purification would cost a third
    of the speed, and what they learn from attacks would stay untrained. Pretraining and fine-tuning are short, for the
    commands' sake.
    """
    base = cifar10_cpu()
    model = base.control_model
    views = CertifiableViews(
        noised=0.25,
        masked=0.45,
        ablated=0.15,
        sigmas=(0.25,),
        cutouts=(GreedyCutout(5, masks_per_axis=6, candidates=1), GreedyCutout(5, masks_per_axis=3, candidates=1)),
        parts=PixelParts(((6, 6), (8, 8))),
    )
    loop = LoopConfig(epochs=36, batch_size=256, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, clip_norm=5.0)
    return replace(
        base,
        name="cifar10-certified",
        about="CIFAR-10, compact network trained for the three certificates",
        cost="74 minutes of training on one CPU core (measured)",
        expected="clean 89.2, certified l2 .25 63, 5x5 patch 46, 8 pixels 52 (results/benchmarks/certification.json)",
        model=model,
        control_model=model,
        certificates=("l2", "patch", "l0"),
        train=replace(base.control, loop=loop, views=views),
        finetune=FinetuneConfig(
            loop=LoopConfig(epochs=0.5, batch_size=256, learning_rate=2e-4),
            augment=AUGMENT,
            attacks=(PatchSizes((5,), num_steps=3, alpha=0.35), PixelCounts(5, 30, num_steps=3)),
            attacked_share=0.2,
            views=replace(views, masked=0.35),
        ),
    )
