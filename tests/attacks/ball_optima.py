"""What the best attack on a linear model gains, in closed form, for every ball together with the box."""

import torch
from torch import Tensor

from amsdn.threats import L1Ball, LinfBall, NormBall


def best_gain(ball: NormBall, w: Tensor, x: Tensor) -> Tensor:
    """max of w.(x_adv - x) over the members of ball and box around x [B,3,H,W], in double precision, [B]."""
    w, x = w.double().expand_as(x).flatten(1), x.double().flatten(1)
    eps = torch.as_tensor(ball.budget).double().reshape(-1, 1)
    room = torch.where(w > 0, 1 - x, x)  # to the wall, in the direction that gains
    if isinstance(ball, LinfBall):
        return (w.abs() * room.minimum(eps)).sum(1)
    if isinstance(ball, L1Ball):  # the best value first, as far as its wall, until the budget is spent
        value, order = w.abs().sort(1, descending=True)
        room = room.gather(1, order)
        spent_before = room.cumsum(1) - room
        return (value * (eps - spent_before).clamp_min(0).minimum(room)).sum(1)
    low, high = torch.zeros_like(eps).expand(len(x), 1), torch.full((len(x), 1), 1e6, dtype=torch.double)
    for _ in range(200):  # L2: |w_i| / lambda, cut at the wall, where lambda spends the budget
        middle = (low + high) / 2
        too_long = (w.abs() / middle).minimum(room).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    return (w.abs() * (w.abs() / high).minimum(room)).sum(1)
