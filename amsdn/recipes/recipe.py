"""What a recipe is: one typed value that says how to train, attack, evaluate and certify a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from amsdn.attacks import Attack
from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.smoothing_attack import RecheckConfig
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes.defences import DefenceAttacks, PatchDefence, PixelDefence
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.pretrain_ssrt import PretrainConfig


@dataclass(frozen=True)
class Recipe:
    """One whole run. A recipe derives from another by ``dataclasses.replace``."""

    name: str
    about: str  # one line: what for, on what machine, how long
    data: str  # what load_dataset takes
    model: AMSDNConfig
    pretrain: PretrainConfig
    train: AdversarialTrainConfig
    finetune: FinetuneConfig
    control_model: AMSDNConfig  # the same backbone without any defence
    control: AdversarialTrainConfig  # trained cleanly
    attacks: Mapping[str, Attack]  # what evaluation tries, by name
    headline: Mapping[str, float]  # family -> the budget that the headline table states
    samples: int | None = None  # test images attacked; None: all
    certified_samples: int = 100
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    smoothing: SmoothingConfig = field(default_factory=SmoothingConfig)
    recheck: RecheckConfig = field(default_factory=RecheckConfig)  # attacks on what smoothing certified
    patch: PatchDefence = field(default_factory=PatchDefence)  # the mask set should be one of the training's
    pixels: PixelDefence = field(default_factory=PixelDefence)
    defence_attacks: DefenceAttacks = field(default_factory=DefenceAttacks)  # on these two certified classifiers
