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
    """Stage three. Shares are of every batch; what they leave over is clean."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=3, learning_rate=5e-4))
    loss: DefenceLoss = field(default_factory=DefenceLoss)
    augment: Augment = field(default_factory=Augment)
    attacks: tuple[Attack, ...] = field(default_factory=default_attacks)
    attacked_share: float = 0.5
    noised_share: float = 0.25
    noise_sigmas: tuple[float, ...] = (0.12, 0.25)  # standard deviations, in [0,1] pixel units
    consistency: float = 2.0  # weight of the agreement of two noisy copies
    mask_side: int = 9  # of the square cut out of every clean image, in pixels
    error_momentum: float = 0.95


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
        config, x, y = self.config, self.config.augment(batch.x, batch.generator), batch.y
        noised = round(config.noised_share * len(x))
        attacked = max(1, round(config.attacked_share * len(x)))
        rest, labels = x[noised:], y[noised:]
        rest = torch.cat([rest[:attacked], self.mask(rest[attacked:], batch.generator)])
        chosen = draw(self.running_error, batch.generator)
        output = defence_step(model, teacher, config.attacks[chosen], rest, labels, attacked, config.loss, batch.generator)
        self._remember(chosen, output)
        if noised:
            self._add_noise_loss(output, model, x[:noised], y[:noised], batch.generator)
        return output

    def _remember(self, chosen: int, output: StepOutput) -> None:
        """Also keeps every attack's chance above 5 %, so that none is forgotten."""
        error = 1 - float(output.metrics["accuracy_attacked"])
        m = self.config.error_momentum
        self.running_error[chosen] = max(0.05, m * float(self.running_error[chosen]) + (1 - m) * error)

    def _add_noise_loss(self, output: StepOutput, model: AMSDN, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        sigmas = torch.tensor(self.config.noise_sigmas, device=x.device)
        index = torch.randint(len(sigmas), (len(x),), generator=generator, device=x.device)
        sigma = sigmas[index].reshape(-1, 1, 1, 1).repeat(2, 1, 1, 1)
        twice = torch.cat([x, x])
        # Not clipped to [0,1]: the smoothed classifier will not clip either.
        noisy = twice + sigma * torch.randn(twice.shape, generator=generator, device=x.device)
        logits_a, logits_b = model(noisy).float().chunk(2)
        entropy = (F.cross_entropy(logits_a, y) + F.cross_entropy(logits_b, y)) / 2
        agreement = noise_consistency(logits_a, logits_b)
        output.loss = output.loss + self.config.noised_share * (entropy + self.config.consistency * agreement)
        output.metrics |= {
            "cross_entropy_noised": entropy.detach(),
            "noise_consistency": agreement.detach(),
            "accuracy_noised": accuracy(logits_a, y),
        }


if __name__ == "__main__":
    import sys

    from amsdn.cli import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
