"""What a recipe is: one typed value that says how to train, attack, evaluate and certify a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from amsdn.attacks import Attack
from amsdn.errors import InputError
from amsdn.evaluation.evaluate import EvaluateConfig
from amsdn.evaluation.smoothing_attack import RecheckConfig
from amsdn.evaluation.smoothing_judges import SmoothingConfig
from amsdn.models.amsdn import AMSDNConfig
from amsdn.recipes.defences import DefenceAttacks, PatchDefence, PixelDefence
from amsdn.training.adversarial_train import AdversarialTrainConfig
from amsdn.training.finetune_attacks import FinetuneConfig
from amsdn.training.loop import LoopConfig
from amsdn.training.pretrain_ssrt import PretrainConfig

Method = Literal["l2", "patch", "l0"]
METHODS: tuple[Method, ...] = ("l2", "patch", "l0")  # of certifying: smoothing, double masking, votes over pixels


@dataclass(frozen=True)
class BudgetShares:
    """How a time budget for all of training is divided. Only the proportions count. Raises InputError for a share that is not positive."""

    pretrain: float
    train: float
    finetune: float

    def __post_init__(self) -> None:
        if not min(self.pretrain, self.train, self.finetune) > 0:
            raise InputError(f"budget_shares must be positive, got {self.pretrain}, {self.train} and {self.finetune}")

    def seconds(self, budget_s: float) -> dict[str, float]:
        """The stages' parts of ``budget_s``, by name."""
        whole = self.pretrain + self.train + self.finetune
        return {name: budget_s * share / whole for name, share in vars(self).items()}


@dataclass(frozen=True)
class Recipe:
    """One whole run. A recipe derives from another by ``dataclasses.replace``."""

    name: str
    about: str  # one line: what for, on what machine
    cost: str  # what training takes, and whether somebody measured that
    expected: str  # the numbers it should give, and who measured them
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
    certificates: tuple[Method, ...] = METHODS  # those that training prepares the model for
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    smoothing: SmoothingConfig = field(default_factory=SmoothingConfig)
    recheck: RecheckConfig = field(default_factory=RecheckConfig)  # attacks on what smoothing certified
    patch: PatchDefence = field(default_factory=PatchDefence)  # the mask set should be one of the training's
    pixels: PixelDefence = field(default_factory=PixelDefence)
    defence_attacks: DefenceAttacks = field(default_factory=DefenceAttacks)  # on these two certified classifiers
    budget: str | None = (
        None  # time for all of training, such as 30min, to which schedules are fitted; None: as many epochs as the stages say
    )
    budget_shares: BudgetShares | None = None  # how the stages divide a budget; None: in proportion to the planned work

    def shares(self) -> BudgetShares:
        """How the three stages divide a time budget."""
        if self.budget_shares is not None:
            return self.budget_shares
        return BudgetShares(
            pretrain=_work(self.pretrain.loop, self.pretrain.attacks, 0.5),
            train=_work(self.train.loop, self.train.attacks, self.train.attacked_share * (1 - self.train.clean_start)),
            finetune=_work(self.finetune.loop, self.finetune.attacks, self.finetune.attacked_share),
        )


def _work(loop: LoopConfig, attacks: Sequence[object], attacked: float) -> float:
    """Passes of the network for each training image, roughly: a step that learns costs three forward passes, one that attacks two."""
    steps = [float(getattr(attack, "num_steps", 1)) for attack in attacks]
    return loop.epochs * (3 + attacked * 2 * sum(steps) / max(1, len(steps)))
