"""Stage three: fine-tuning against several threats, the weakest point first.

Every batch meets one attack, drawn in proportion to the model's running error under it, so that effort
goes where the model fails (after Madaan et al. 2021 and Croce and Hein 2022, E-AT: alternating between
threats, a few epochs suffice). Another part of the batch is given to the views that certificates ask about.

``amsdn finetune`` or ``python -m amsdn.training.finetune_attacks`` runs it.
"""

from dataclasses import dataclass, field

from torch import nn

from amsdn.attacks import PatchPGD, PGDAttack, PGDL2Attack, SparsePGD
from amsdn.errors import InputError
from amsdn.training.attack_mix import ErrorProportional, UniformMix
from amsdn.training.attack_ranges import TrainingAttack
from amsdn.training.defence import DefenceConfig, DefenceStage, check_shares
from amsdn.training.settings import LoopConfig
from amsdn.training.stage import Batch, StepOutput
from amsdn.training.views import CertifiableViews


def default_attacks() -> tuple[TrainingAttack, ...]:
    """Linf, L2, patch and sparse, with the few steps that training can afford."""
    return (
        PGDAttack(epsilon=4 / 255, alpha=2 / 255, num_steps=4, stop_when_fooled=False),
        PGDL2Attack(epsilon=0.5, alpha=0.25, num_steps=4, stop_when_fooled=False),
        PatchPGD(size=8, num_steps=6, alpha=0.25, stop_when_fooled=False),
        SparsePGD(k=30, num_steps=6, stop_when_fooled=False),
    )


@dataclass(frozen=True)
class FinetuneConfig(DefenceConfig):
    """Stage three. Raises InputError where attacks and views leave no clean images."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=3, learning_rate=5e-4))
    attacks: tuple[TrainingAttack, ...] = field(default_factory=default_attacks)
    attacked_share: float = 0.4
    mix: UniformMix = ErrorProportional()
    views: CertifiableViews = field(default_factory=lambda: CertifiableViews(noised=0.2, masked=0.2, consistency=2.0))

    def __post_init__(self) -> None:
        if not self.attacked_share > 0 or self.attacked_share + self.views.share >= 1:
            raise InputError(
                "finetune: some images must be attacked and some left clean, got shares of "
                f"{self.attacked_share:g} attacked and {self.views.share:g} for views"
            )
        if not self.attacks:
            raise InputError("finetune: needs at least one attack; leave this stage out for none")
        check_shares(self, "finetune")
        super().__post_init__()


class Finetuning(DefenceStage):
    """Every batch is attacked, on the batch statistics that adversarial training left."""

    name = "finetune"

    def __init__(self, config: FinetuneConfig, images: int | None = None) -> None:
        super().__init__(config, images)

    def attacks_at(self, progress: float) -> bool:
        return True

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        freeze_statistics(model)
        return super().step(model, teacher, batch)


def freeze_statistics(model: nn.Module) -> None:
    """Put every batch norm into eval mode, so that it keeps the statistics that adversarial training left.

    A batch here mixes attacked, noised, masked and clean images. Their shared statistics fit none of them: measured on
    digits, they took the alarms on sparse attacks from 24 of 24 to 3 (one seed).
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
