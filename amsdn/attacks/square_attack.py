"""Square: black-box random search over square windows for Linf and L2 (Andriushchenko et al., ECCV 2020).

Every sample moves its own window in the same step, without a loop over samples. Deviations from the authors' code, for both
norms: ties are accepted, as in all our searches; windows reach the last row and column, as the paper says and the code
does not.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from amsdn.attacks.base import require_bounded
from amsdn.attacks.losses import CROSS_ENTROPY, MARGIN, Goal, Loss
from amsdn.attacks.patch_attacks import cut, paste
from amsdn.attacks.search_attacks import State, _RandomSearch
from amsdn.threats import L2Ball, LinfBall, ThreatModel, square_mask

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the last proposal of 10,000, counted from 0, before p is halved
FEW = 200  # queries below which a window of the L2 search grows threefold; at 200 either rule fools as many


@dataclass(frozen=True)
class MarginOrCrossEntropy(Loss):
    """The margin, or for a targeted goal cross-entropy: what the paper found best for each."""

    def __call__(self, logits: Tensor, goal: Goal) -> Tensor:
        return (CROSS_ENTROPY if goal.targeted else MARGIN)(logits, goal)


@dataclass(frozen=True)
class _Square(_RandomSearch):
    """What both norms share. A state is (image [B,3,H,W], eps [B,1,1,1]).

    The side of a window is sqrt(p H W) pixels, where p is ``alpha_init`` (the paper's initial p) halved after each of the
    proposals 10/50/200/500/1000/2000/4000/6000/8000 of 10,000 (rescaled; the first is number 0, as in the authors' code).
    An image costs at most ``num_queries`` forward passes, the start included.
    """

    epsilon: float
    num_queries: int = 5000
    alpha_init: float = 0.8
    loss: Loss = MarginOrCrossEntropy()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bounded(self)

    @abstractmethod
    def _first(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        """A member of the threat around each x [B,3,H,W]; eps [B,1,1,1]."""

    @abstractmethod
    def _change(self, x_adv: Tensor, x: Tensor, eps: Tensor, side: int, generator: torch.Generator) -> Tensor:
        """A changed copy of each member x_adv [B,3,H,W], still a member."""

    def start(self, x: Tensor, threat: ThreatModel, generator: torch.Generator) -> State:
        eps = torch.as_tensor(threat.budget, device=x.device, dtype=x.dtype).expand(len(x)).reshape(-1, 1, 1, 1)
        return self._first(x, eps, generator), eps

    def propose(self, state: State, query: int, x: Tensor, generator: torch.Generator) -> State:
        x_adv, eps = state
        share = self.alpha_init / 2 ** _halvings(query - 1, self.num_queries)
        side = min(max(round((share * x[0, 0].numel()) ** 0.5), 1), *x.shape[2:])
        return self._change(x_adv, x, eps, side, generator), eps

    def render(self, state: State, x: Tensor) -> Tensor:
        return state[0]


@dataclass(frozen=True)
class SquareAttack(_Square):
    """Square for Linf: vertical stripes of +-epsilon first, then squares that take +-epsilon in each channel (Algorithm 2).

    A proposal that would change nothing takes another colour, drawn from those that do, as in the authors' first code.
    """

    epsilon: float = 8 / 255  # in [0,1] pixel units; a tensor [B] gives one budget per image

    @property
    def threat(self) -> LinfBall:
        return LinfBall(self.epsilon)

    def _first(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        stripes = _signs((*x.shape[:2], 1, x.shape[3]), x, generator)
        return (x + eps * stripes).clamp(0, 1)

    def _change(self, x_adv: Tensor, x: Tensor, eps: Tensor, side: int, generator: torch.Generator) -> Tensor:
        window = _window(_corners(x, side, generator), side, x)
        colour = _signs((*x.shape[:2], 1, 1), x, generator)
        flip = torch.randint(1, 8, (len(x), 1), generator=generator, device=x.device)  # any but none of the three channels
        other = colour * (1 - 2 * (flip >> torch.arange(3, device=x.device) & 1)).reshape(-1, 3, 1, 1)
        same = (torch.where(window, (x + eps * colour).clamp(0, 1), x_adv) == x_adv).flatten(1).all(1)
        colour = torch.where(same.reshape(-1, 1, 1, 1), other, colour)
        return torch.where(window, (x + eps * colour).clamp(0, 1), x_adv)


@dataclass(frozen=True)
class SquareL2Attack(_Square):
    """Square for L2: a grid of pulses first; then one window's change moves into another, as a pulse (Algorithm 3).

    Each channel of the window receives the length that this channel had in both windows: so the paper and the authors' first
    code. AutoAttack's code (and torchattacks') gives each channel that of all three, then scales the whole image back, so
    a window grows threefold. From 500 queries on this is weaker, at 100 stronger (docs/attacks/square.md has the numbers),
    so below ``FEW`` queries we do the same.
    """

    epsilon: float = 0.5  # Euclidean length over all pixels and channels; a tensor [B] gives one budget per image

    @property
    def threat(self) -> L2Ball:
        return L2Ball(self.epsilon)

    def _first(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        side = max(min(x.shape[2:]) // 5, 1)
        rows, columns = x.shape[2] // side, x.shape[3] // side
        top, left = (x.shape[2] - rows * side) // 2, (x.shape[3] - columns * side) // 2
        tiles = _pulses((len(x), 3, rows * columns), side, x, generator)  # [B,3,tiles,side,side]
        grid = tiles.reshape(-1, 3, rows, columns, side, side).transpose(3, 4).reshape(-1, 3, rows * side, columns * side)
        delta = torch.zeros_like(x)
        delta[:, :, top : top + grid.shape[2], left : left + grid.shape[3]] = grid
        return _on_sphere(delta, x, eps)

    def _change(self, x_adv: Tensor, x: Tensor, eps: Tensor, side: int, generator: torch.Generator) -> Tensor:
        side = _odd(side, min(x.shape[2:]))
        delta = x_adv - x
        to, source = _corners(x, side, generator), _corners(x, side, generator)
        source_mask = _window(source, side, x)
        both = source_mask | _window(to, side, x)
        free = (eps.square() - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / 3  # the box cut it off; per channel
        moved = torch.where(both, delta, 0).square().sum((2, 3), keepdim=True)  # [B,3,1,1]
        mass = (free + (moved.sum(1, keepdim=True) if self.num_queries < FEW else moved)).sqrt()
        pulse = _pulses((len(x), 3), side, x, generator)
        shape = _unit(_unit(cut(delta, to, side)) + pulse)
        return _on_sphere(paste(torch.where(source_mask, 0, delta), shape * mass, to), x, eps)


def _halvings(proposal: int, num_queries: int) -> int:
    """How often p has been halved at a proposal, counted from 0."""
    return sum(proposal * 10_000 // num_queries > last for last in HALVINGS)


def _pulses(shape: tuple[int, ...], side: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Pulses of unit length and random sign, [*shape,side,side]; upright or turned, one draw for each first index but the second.

    A pulse is two halves of opposite sign, each a peak of concentric squares (eq. 2 and 3 of the paper).
    """
    upper, lower = side // 2, side - side // 2
    pulse = _unit(torch.cat((_peak(upper, side, like), -_peak(lower, side, like))))
    turned = torch.rand((shape[0], 1, *shape[2:], 1, 1), generator=generator, device=like.device) > 0.5
    return torch.where(turned, pulse.T, pulse) * _signs((*shape, 1, 1), like, generator)


def _peak(height: int, width: int, like: Tensor) -> Tensor:
    """Concentric squares around the middle, of unit length: the sum of 1 / (k+1)^2 over k from the pixel's ring outwards."""
    i, j = torch.arange(height, device=like.device).unsqueeze(1), torch.arange(width, device=like.device)
    ring = torch.maximum((i - height // 2).abs(), (j - width // 2).abs())
    rings = torch.arange(max(height, width) // 2 + 1, device=like.device)
    return _unit((1 / (rings + 1.0).square()).flip(0).cumsum(0).flip(0)[ring])


def _odd(side: int, limit: int) -> int:
    """The nearest odd side from 3 up that fits (pulses have a middle); below 3 only where the image is that small."""
    side = max(side, 3) | 1
    return side if side <= limit else limit - 1 + limit % 2


def _on_sphere(delta: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """x + delta at length eps, cut to the box."""
    length = delta.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
    return (x + delta * (eps / length)).clamp(0, 1)


def _unit(patch: Tensor) -> Tensor:
    """Each last two dimensions at Euclidean length 1; zero stays zero."""
    return patch / patch.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-12)


def _window(corner: Tensor, side: int, like: Tensor) -> Tensor:
    """True inside the square at each corner [B,2], [B,1,H,W] bool."""
    return square_mask(corner[:, 0], corner[:, 1], side, like)


def _corners(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A uniform top-left corner of a window for each image, [B,2] (row, column)."""
    rows, columns = (torch.randint(n - side + 1, (len(x),), generator=generator, device=x.device) for n in x.shape[2:])
    return torch.stack((rows, columns), 1)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform over {-1, 1}, float32."""
    return torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1
