"""What an attack must do to be adaptive: look through gradients that lie and through randomness.

BPDA (Athalye, Carlini & Wagner, ICML 2018) takes the value of the real model and the gradient of a differentiable
stand-in. EOT (Athalye et al., ICML 2018) attacks the expectation over the model's own randomness.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]  # images [B,3,H,W] -> logits [B,K]


def bpda(model: Forward, surrogate: Forward) -> Forward:
    """A forward whose value is the model's, to the last bit, and whose gradient is the surrogate's at that value."""

    def forward(x: Tensor) -> Tensor:
        stand_in = surrogate(x)
        with torch.no_grad():
            real = model(x)
        return real + (stand_in - stand_in.detach())

    return forward


def expected_logits(forward: Forward, x: Tensor, draws: int) -> Tensor:
    """EOT over ``draws`` calls: the log of the mean class probability, [B,K] float32.

    Probabilities are averaged, not logits or losses, because a probability is bounded: a draw that is already fooled
    with a huge logit cannot drown the draws that still stand, and the gradient of the log of the mean puts its weight
    on exactly those. The draws are separate calls, since a model may share one draw within a batch.
    """
    return log_mean_probability([forward(x).float() for _ in range(draws)])


def log_mean_probability(answers: Sequence[Tensor]) -> Tensor:
    """The log of the mean class probability over the logits [B,K] of several calls; of a single call, its logits as they are."""
    if len(answers) == 1:
        return answers[0]
    return torch.stack([F.log_softmax(logits, 1) for logits in answers]).logsumexp(0) - math.log(len(answers))


def vote_logits(forward: Forward, x: Tensor, draws: int) -> Tensor:
    """The log of each class's share of the answers over ``draws`` calls, [B,K]; the mean probability breaks ties.

    With an odd number of draws a class other than the label wins only if most draws are wrong, so one lucky draw
    never counts as a success.
    """
    return tally([forward(x).float() for _ in range(draws)])


def tally(answers: Sequence[Tensor]) -> Tensor:
    """The vote of ``vote_logits`` over the logits [B,K] of several calls."""
    assert answers, "a vote needs at least one draw"
    score = torch.zeros_like(answers[0])
    for logits in answers:
        score = score + F.one_hot(logits.argmax(1), logits.shape[1]) + logits.softmax(1) / len(answers)
    return (score / (len(answers) + 1)).log()


@contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Within, no parameter asks for a gradient: autograd then keeps and computes only what the images need."""
    parameters = [p for m in models if isinstance(m, nn.Module) for p in m.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextmanager
def reproducible(x: Tensor, generator: torch.Generator) -> Iterator[None]:
    """Within, a random model's use of the global generators follows ``generator``; afterwards they are as before."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
