"""Stage three: fine-tuning against several threats, the weakest point first.

Every batch meets one attack, drawn in proportion to the model's running error under it, so that effort
goes where the model fails (after Madaan et al. 2021 and Croce and Hein 2022, E-AT: alternating between
threats, a few epochs suffice). A part of the batch is Gaussian noised with two agreeing copies, for
randomized smoothing (Jeong and Shin 2020), a part is masked, for double masking and occlusion.

``amsdn finetune`` or ``python -m amsdn.training.finetune_attacks`` runs it.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amsdn.attacks import Attack, PatchPGD, PGDAttack, PGDL2Attack, SparsePGD
from amsdn.data.augment import Augment
from amsdn.errors import InputError
from amsdn.models.amsdn import AMSDN
from amsdn.training.adversarial_train import DefenceLoss, accuracy, defence_step, draw
from amsdn.training.loop import Batch, LoopConfig, Stage, StepOutput
from amsdn.training.objectives import noise_consistency


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
    noised_share: float = 0.2
    masked_share: float = 0.2
    noise_sigmas: tuple[float, ...] = (0.12, 0.25)  # standard deviations, in [0,1] pixel units
    consistency: float = 2.0  # weight of the agreement of two noisy copies
    mask_side: int = 9  # of the square that covers a masked image, in pixels
    error_momentum: float = 0.95

    def __post_init__(self) -> None:
        shares = (self.attacked_share, self.noised_share, self.masked_share)
        if min(shares) < 0 or sum(shares) >= 1:
            raise InputError(f"finetune: shares must be at least 0 and leave some images clean, got {shares}; make them smaller")
        if not self.attacks or not self.noise_sigmas or min(self.noise_sigmas) <= 0:
            raise InputError(
                f"finetune: needs at least one attack and positive noise_sigmas, got {len(self.attacks)} and {self.noise_sigmas}"
            )


class Finetuning(Stage):
    """Remembers the running error under each attack."""

    name = "finetune"

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.running_error = torch.full((len(config.attacks),), 0.5, dtype=torch.float64)
        self.mask = replace(config.augment, flip=False, shift=0, cutout=config.mask_side)

    def state(self) -> dict[str, Any]:
        return {"running_error": self.running_error}

    def load(self, state: dict[str, Any]) -> None:
        self.running_error = state["running_error"]

    def step(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> StepOutput:
        assert isinstance(model, AMSDN)
        assert isinstance(teacher, AMSDN)
        freeze_statistics(model)
        config, x, y = self.config, self.config.augment(batch.x, batch.generator), batch.y
        noised, masked, attacked = (round(share * len(x)) for share in (config.noised_share, config.masked_share, config.attacked_share))
        noised = min(noised, len(x) - 1)  # of a tiny batch, something is left to attack
        corrupted = min(noised + masked, len(x) - 1)
        attacked = min(max(1, attacked), len(x) - corrupted)
        chosen = draw(self.running_error, batch.generator)
        attack = config.attacks[chosen]
        output = defence_step(model, teacher, attack, x[corrupted:], y[corrupted:], attacked, config.loss, batch.generator)
        self._remember(chosen, output)
        if corrupted:
            self._add_corruptions(output, model, x[:corrupted], y[:corrupted], noised, batch.generator)
        return output

    def _remember(self, chosen: int, output: StepOutput) -> None:
        """No attack's weight in the draw falls below 0.05, so that none is forgotten."""
        error = 1 - float(output.metrics["accuracy_attacked"])
        m = self.config.error_momentum
        self.running_error[chosen] = max(0.05, m * float(self.running_error[chosen]) + (1 - m) * error)

    def _add_corruptions(self, output: StepOutput, model: AMSDN, x: Tensor, y: Tensor, noised: int, generator: torch.Generator) -> None:
        """The first ``noised`` images twice with Gaussian noise, the others masked; all are classified, none is an attack to detect.

        The detector learns from neither: a mask is no attack, yet telling it that a covered square is clean would
        teach it to overlook patches.
        """
        copies = torch.cat([x[:noised], x[:noised]])
        sigmas = torch.tensor(self.config.noise_sigmas, device=x.device)
        index = torch.randint(len(sigmas), (noised,), generator=generator, device=x.device)
        noise = sigmas[index].repeat(2).reshape(-1, 1, 1, 1) * torch.randn(copies.shape, generator=generator, device=x.device)
        # Noisy images are not clipped to [0,1]: the smoothed classifier will not clip either.
        logits = model(torch.cat([copies + noise, self.mask(x[noised:], generator)])).float()
        first, second, masked = logits[:noised], logits[noised : 2 * noised], logits[2 * noised :]
        output.loss = output.loss * (1 - (self.config.noised_share + self.config.masked_share))
        if noised:
            entropy = (F.cross_entropy(first, y[:noised]) + F.cross_entropy(second, y[:noised])) / 2
            agreement = noise_consistency(first, second)
            output.loss = output.loss + self.config.noised_share * (entropy + self.config.consistency * agreement)
            output.metrics |= {"cross_entropy_noised": entropy.detach(), "noise_consistency": agreement.detach()}
            output.metrics["accuracy_noised"] = accuracy(first, y[:noised])
        if len(masked):
            entropy = F.cross_entropy(masked, y[noised:], label_smoothing=self.config.loss.label_smoothing)
            output.loss = output.loss + self.config.masked_share * entropy
            output.metrics |= {"cross_entropy_masked": entropy.detach(), "accuracy_masked": accuracy(masked, y[noised:])}


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
