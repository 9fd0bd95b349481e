"""Adversarial weight perturbation: learn from the gradient at weights made worse on purpose, for flatter minima."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amsdn.errors import InputError


@dataclass(frozen=True)
class WeightPerturbation:
    """AWP (Wu, Xia & Wang, NeurIPS 2020, eqs. 9-12): the gradient is taken at w + v, with |v_l| <= gamma |w_l| in every layer l.

    v is one normalised ascent step on the step's own loss: v_l = gamma |w_l| g_l / |g_l|. Layers are the parameters of two or
    more dimensions, as in the authors' code, so norms and biases stay. The paper allows several steps, and its code takes this one.
    It costs one more forward and backward pass. ``gamma`` is 5e-3 in the paper; 0 switches it off.

    Differences from the authors' code: it steps on a copy of the network, so that ours puts back the batch statistics which the
    ascent's pass moved; it subtracts v again, we put back the very weights; for plain adversarial training it perturbs by the loss
    of the attacked images, we by the whole loss of the step, which is what the result is to be flat in. Where a batch is computed in
    several parts, each part has a perturbation of its own.
    """

    gamma: float = 0.0  # share of a layer's norm

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise InputError(f"awp: gamma must lie in [0, 1), got {self.gamma}; the paper uses 5e-3")

    def ascend(self, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None] | None:
        """Move ``model``'s weights to where ``loss()``, a scalar, is greater. Returns what puts them back bit for bit, or None if off.

        The gradients of the weights and the buffers are as before. If ``loss`` raises, so are the weights.
        """
        if not self.gamma:
            return None
        moved = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
        buffers = [(b, b.clone()) for b in model.buffers()]
        try:
            gradients = torch.autograd.grad(loss(), moved, allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        kept = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p, gradient in zip(moved, gradients, strict=True):
                if gradient is not None:
                    p.add_(gradient * (self.gamma * p.norm() / gradient.norm().clamp_min(1e-20)))
        _forget_casts()

        def restore() -> None:
            with torch.no_grad():
                for p, before in zip(moved, kept, strict=True):
                    p.copy_(before)
            _forget_casts()

        return restore


def _forget_casts() -> None:
    """Autocast keeps the bfloat16 copies of weights until it is left, and would go on with those of the weights before the change."""
    torch.clear_autocast_cache()
