"""ImageNet, from a folder, on several GPUs."""

from dataclasses import replace

from amsdn.attacks import PatchPGD, SparsePGD
from amsdn.data.augment import Augment
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes.defences import PatchDefence, PixelDefence
from amsdn.recipes.recipe import Recipe
from amsdn.recipes.suites import quick_suite
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.attack_mix import ErrorProportional
from amsdn.training.attack_ranges import PatchSizes, PixelCounts
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.loop import LoopConfig
from amsdn.training.pretrain_ssrt import PretrainConfig
from amsdn.training.views import CertifiableViews, GreedyCutout, PixelParts

SIDE = 224
HEADLINE = {"patch": 32, "sparse": 250, "linf": 4 / 255, "l2": 1.0}  # 32 px: 2 % of the image, the field's usual patch
AUGMENT = Augment(flip=True, shift=16)


def imagenet() -> Recipe:
    """ConvNeXt-Tiny from ImageNet weights, defended by fine-tuning on a folder with train/CLASS/* and val/CLASS/*.

    ``torchrun --nproc-per-node 8 -m amsdn train imagenet --data folder:/data/imagenet``. Weights come from the hub, or with
    ``--model.pretrained FILE`` from a safetensors file of timm's form. docs/training/scale.md reckons what it costs.
    """
    model = AMSDNConfig(num_classes=1000, variant="tiny", pretrained=True, drop_path=0.05)
    loop = LoopConfig(epochs=5, batch_size=1024, learning_rate=2e-4, weight_decay=0.05, warmup=0.1, ema_decay=0.9995, compile=True)
    masks = (GreedyCutout(32, masks_per_axis=6, candidates=1), GreedyCutout(32, masks_per_axis=3, candidates=1))
    views = CertifiableViews(masked=0.4, cutouts=masks)
    return Recipe(
        name="imagenet",
        about="ImageNet folder at 224 px, ConvNeXt-Tiny from ImageNet weights, several GPUs",
        cost="reckoned, not run: see docs/training/scale.md",
        expected="not measured; PatchCleanser's pretrained networks certify about 60 % against 2 % patches",
        data="folder:imagenet",
        model=model,
        control_model=replace(model, fpn=False, attention=False, purification=False),
        control=AdversarialTrainConfig(loop=replace(loop, epochs=1), augment=AUGMENT, attacks=()),
        pretrain=PretrainConfig(loop=replace(loop, epochs=0.25), augment=AUGMENT),
        train=AdversarialTrainConfig(
            loop=loop,
            augment=AUGMENT,
            attacks=(PatchSizes((24, 32, 40), num_steps=5, stride=8), PixelCounts(100, 1500, num_steps=3)),
            attacked_share=0.35,
            clean_start=0.05,
            views=views,
        ),
        finetune=FinetuneConfig(
            loop=replace(loop, epochs=1, learning_rate=2e-5, warmup=0.02),
            augment=AUGMENT,
            attacks=(
                PatchPGD(32, num_steps=12, alpha=0.15, stride=8, stop_when_fooled=False),
                SparsePGD(k=1000, num_steps=12, patience=10, stop_when_fooled=False),
            ),
            attacked_share=0.4,
            mix=ErrorProportional(),
            views=CertifiableViews(noised=0.1, masked=0.3, ablated=0.05, sigmas=(0.25,), cutouts=masks, parts=PixelParts(((8, 8),))),
        ),
        attacks=quick_suite(patches=(16, 32), pixels=(100, 250), headline=HEADLINE, steps=100, targets=9),
        headline=HEADLINE,
        samples=1000,
        certified_samples=1000,
        smoothing=SmoothingConfig(sigma=0.25),
        patch=PatchDefence(size=32),
        pixels=PixelDefence(rows=8, columns=8),
    )
