"""Stage three: fine-tuning against several threats, the weakest point first.

Every batch meets one attack, drawn in proportion to the model's running error under it, so that effort
goes where the model fails (after Madaan et al. 2021 and Croce and Hein 2022, E-AT: alternating between
threats, a few epochs suffice). Another part of the batch is given to the views that certificates ask about.

``amsdn finetune`` or ``python -m amsdn.training.finetune_attacks`` runs it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from amsdn.attacks import Attack, PatchPGD, PGDAttack, PGDL2Attack, SparsePGD
from amsdn.data.augment import Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.training.adversarial_train import DefenceLoss, defence_step, draw
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput
from amsdn.training.views import CertifiableViews


def default_attacks() -> tuple[Attack, ...]:
    """Linf, L2, patch and sparse, with the few steps that training can afford."""
    return (
        PGDAttack(epsilon=4 / 255, alpha=2 / 255, num_steps=4, stop_when_fooled=False),
        PGDL2Attack(epsilon=0.5, alpha=0.25, num_steps=4, stop_when_fooled=False),
        PatchPGD(size=8, num_steps=6, alpha=0.25, stop_when_fooled=False),
        SparsePGD(k=30, num_steps=6, stop_when_fooled=False),
    )


@dataclass(frozen=True)
class FinetuneConfig:
    """Stage three. Shares are of every batch; what they leave over is clean. Raises InputError where they leave nothing."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=3, learning_rate=5e-4))
    loss: DefenceLoss = field(default_factory=DefenceLoss)
    augment: Augment = field(default_factory=Augment)
    attacks: tuple[Attack, ...] = field(default_factory=default_attacks)
    attacked_share: float = 0.4
    views: CertifiableViews = field(default_factory=lambda: CertifiableViews(noised=0.2, masked=0.2, consistency=2.0))
    error_momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.attacked_share < 0 or self.attacked_share + self.views.share >= 1:
            raise InputError(
                "finetune: shares must be at least 0 and leave some images clean, got "
                f"attacked {self.attacked_share} and views {self.views.share:g}; make them smaller"
            )
        if not self.attacks:
            raise InputError("finetune: needs at least one attack; leave this stage out for none")


class Finetuning(Stage):
    """Remembers the running error under each attack."""

    name = "finetune"

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.running_error = torch.full((len(config.attacks),), 0.5, dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        return {"running_error": self.running_error}

    def load(self, state: dict[str, Any]) -> None:
        self.running_error = state["running_error"]

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        assert isinstance(model, AMSDN)
        assert isinstance(teacher, AMSDN)
        freeze_statistics(model)
        config, generator = self.config, batch.generator
        x, y = config.augment(batch.x, generator), batch.y
        drawn = config.views.draw(model, x, y, generator)
        chosen = draw(self.running_error, generator)
        attacked = max(1, round(config.attacked_share * len(x)))
        output = defence_step(model, teacher, config.attacks[chosen], x, y, attacked, config.loss, generator, config.views, drawn)
        self._remember(chosen, output)
        return output

    def _remember(self, chosen: int, output: StepOutput) -> None:
        """No attack's weight in the draw falls below 0.05, so that none is forgotten."""
        error = 1 - float(output.metrics["accuracy_attacked"])
        m = self.config.error_momentum
        self.running_error[chosen] = max(0.05, m * float(self.running_error[chosen]) + (1 - m) * error)


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
