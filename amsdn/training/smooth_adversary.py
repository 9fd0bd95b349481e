"""SmoothAdv: images that fool the smoothed classifier, by the very noise that training then adds."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from amsdn.attacks import PGDL2Attack
from amsdn.attacks.adaptive import log_mean_probability
from amsdn.errors import InputError
from amsdn.protocols import surrogate_of


@dataclass(frozen=True)
class SmoothAdversary:
    """PGD on -log of the mean probability over m noisy copies (Salman et al., NeurIPS 2019, eq. 6 and Algorithm 1, SmoothAdv-PGD).

    Steps of 2 epsilon / num_steps along the normalised gradient from the image itself, in the L2 ball and the box. The images
    that come out are then shown with the same m noises. The paper's settings for small radii are sigma .12, ten steps, m = 4 and
    epsilon 64/255 (its code divides by 256). epsilon grows linearly from zero over the first ``warmup`` of the run; there by
    whole epochs, here continuously. Where a gradient is exactly zero the authors step at random, we stay.
    """

    epsilon: float = 0.0  # Euclidean length over all pixels and channels; 0: no adversary
    num_steps: int = 10
    warmup: float = 0.1  # share of the run

    def __post_init__(self) -> None:
        if not self.epsilon >= 0 or self.num_steps < 1 or not 0 <= self.warmup <= 1:
            raise InputError(
                "views: the smooth adversary needs epsilon >= 0, at least one step and a warmup in [0, 1], "
                f"got {self.epsilon}, {self.num_steps} and {self.warmup}"
            )

    def at(self, progress: float) -> Self:
        """The adversary as strong as it is at that share of the run, without a warm-up of its own."""
        grown = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return replace(self, epsilon=grown * self.epsilon, warmup=0.0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        """x [B,3,H,W], y [B], noise [m * B,3,H,W] (copy by copy) -> images [B,3,H,W] to add that noise to. ``model`` is in eval mode."""
        if not self.epsilon:
            return x
        attack = PGDL2Attack(
            self.epsilon, alpha=2 * self.epsilon / self.num_steps, num_steps=self.num_steps, random_start=False, stop_when_fooled=False
        )
        return attack.craft(MeanOverNoise(model, noise.reshape(-1, *x.shape)), x, y, generator)


class MeanOverNoise(nn.Module):
    """images [B,3,H,W] -> the log of the model's mean probabilities over fixed ``noise`` [m,B,3,H,W], [B,K]; one pass of m B images."""

    def __init__(self, model: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.training = model.training
        self.model, self.noise = model, noise
        self.matches_forward = bool(getattr(model, "matches_forward", False))  # as a surrogate it is what the model is

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x + self.noise).flatten(0, 1))
        return log_mean_probability(logits.float().chunk(len(self.noise)))

    def differentiable_surrogate(self) -> "MeanOverNoise | None":
        """The same mean over the model's own stand-in for gradients."""
        surrogate = surrogate_of(self.model)
        return None if surrogate is None else MeanOverNoise(surrogate, self.noise)
