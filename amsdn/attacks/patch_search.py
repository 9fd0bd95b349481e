"""Black-box random search for patches: Patch-RS of Sparse-RS (Croce et al., AAAI 2022)."""

import itertools
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from amsdn.attacks.base import require
from amsdn.attacks.losses import MARGIN, Loss
from amsdn.attacks.patch_attacks import Size, inside, paste, patch_threat, sides
from amsdn.attacks.search_attacks import State, _corner_colours, _RandomSearch
from amsdn.threats import PatchRectangles, PatchRegion, ThreatModel, rectangle_mask

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # after these queries (of 10,000) alpha halves


@dataclass(frozen=True)
class PatchRS(_RandomSearch):
    """Patch-RS: patches of colours in {0,1}^3, recoloured in random windows, and shifted every fourth query.

    A window has sqrt(share) of the patch's height and width, rounded down, where the share is ``alpha_init`` halved
    after 10, 50, 200, 500, 1k, 2k, 4k, 6k and 8k of 10,000 queries (rescaled), and takes one colour. A window of one
    pixel takes another colour than its own; in the second half of that last phase it flips a single channel. A shift is
    uniform within 0.75 x (image side) x (queries left / all). The start is a collage of small squares.
    A state is (content [B,n,3,h,w], corner [B,n,2] as row and column).

    One forward a query. After the authors' code (fra31/sparse-rs), except that every image draws its own window, the
    last row and column of places are in reach, ties are accepted (see search_attacks), a targeted attack minimises the
    margin and not the cross-entropy, and ``size`` may be (height, width). With ``count`` > 1 patches, each query
    changes one of them, drawn at random.
    """

    size: Size = 5  # side of the square or (height, width), pixels
    num_queries: int = 10_000
    alpha_init: float = 0.4
    shift_every: int = 4
    loss: Loss = MARGIN
    count: int = 1  # patches on every image

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shift_every >= 1, self, "shift_every must be at least 1", self.shift_every)
        require(self.count >= 1, self, "count must be at least 1", self.count)

    @property
    def threat(self) -> PatchRegion | PatchRectangles:
        return patch_threat(self.size, self.count)

    def start(self, x: Tensor, threat: ThreatModel, generator: torch.Generator) -> State:
        corner = PatchRectangles(*sides(self.size), self.count).random_corners(x, generator)
        return self._collage(x, generator).unflatten(0, (len(x), self.count)), corner

    def propose(self, state: State, query: int, x: Tensor, generator: torch.Generator) -> State:
        content, corner = state
        one = torch.arange(len(x), device=x.device)
        which = torch.randint(self.count, (len(x),), generator=generator, device=x.device) if self.count > 1 else torch.zeros_like(one)
        if query % self.shift_every == 0:
            shifted = self._shift(corner[one, which], query, x, generator)
            return content, corner.index_put((one, which), shifted)
        patch, window = content[one, which], self._window(query)
        if max(window) > 1:
            patch = self._recolour(patch, window, generator)
        else:
            patch = self._change_pixel(patch, generator, one_channel=query >= self._fine_from())
        return content.index_put((one, which), patch), corner

    def render(self, state: State, x: Tensor) -> Tensor:
        return paste(x, *state)

    def _window(self, query: int) -> tuple[int, int]:
        """Height and width of the recoloured window at this query, pixels."""
        rescaled = query * 10_000 // self.num_queries
        share = self.alpha_init / 2 ** sum(rescaled > end for end in HALVINGS)
        height, width = (max(int(share**0.5 * side), 1) for side in sides(self.size))
        return height, width

    def _fine_from(self) -> int:
        """The query from which single channels flip: half way from the first window of one pixel to the end."""
        ends = (0, *(ceil((end + 1) * self.num_queries / 10_000) for end in HALVINGS))
        first = next((query for query in ends if max(self._window(query)) == 1), self.num_queries)
        return first + (self.num_queries - first) // 2

    def _collage(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A patch for each image and number, [B*n,3,h,w]: small squares of random colours over one another.

        The original pastes 1,000 of sides below sqrt(size); we paste until every pixel is covered about eight times,
        because only what is on top remains.
        """
        height, width = sides(self.size)
        side = max(ceil(min(height, width) ** 0.5) - 1, 1)
        area = (side + 1) * (2 * side + 1) / 6  # the mean of 1, 4, ..., side^2
        content = _corner_colours((len(x) * self.count, 3, height, width), x, generator)
        for _, small in itertools.product(range(ceil(8 * height * width / area / side)), range(side, 0, -1)):
            content = self._recolour(content, (small, small), generator)
        return content

    def _recolour(self, patch: Tensor, window: tuple[int, int], generator: torch.Generator) -> Tensor:
        """patch [B,3,h,w] with one random window in one random colour."""
        ends = [side - inner + 1 for side, inner in zip(patch.shape[2:], window, strict=True)]
        corner = torch.stack([torch.randint(end, (len(patch),), generator=generator, device=patch.device) for end in ends], 1)
        colour = _corner_colours((len(patch), 3, 1, 1), patch, generator)
        return torch.where(rectangle_mask(corner.unsqueeze(1), *window, patch), colour, patch)

    def _change_pixel(self, patch: Tensor, generator: torch.Generator, *, one_channel: bool) -> Tensor:
        """patch [B,3,h,w] with one pixel in another colour: one channel flipped, or any of the seven other colours."""
        flat = patch.flatten(2)
        pixel = torch.randint(flat.shape[2], (len(flat), 1, 1), generator=generator, device=flat.device).expand(-1, 3, -1)
        flips = torch.randint(1, 8, (len(flat), 1, 1), generator=generator, device=flat.device)  # a bit for each channel
        if one_channel:
            flips = 2 ** (flips % 3)
        flip = (flips >> torch.arange(3, device=flat.device).reshape(1, 3, 1)) % 2
        old = flat.gather(2, pixel)
        return flat.scatter(2, pixel, torch.where(flip == 1, 1 - old, old)).reshape(patch.shape)

    def _shift(self, corner: Tensor, query: int, x: Tensor, generator: torch.Generator) -> Tensor:
        reach = max(int(0.75 * max(x.shape[2:]) * (1 - query / self.num_queries)), 1)
        by = torch.randint(-reach, reach + 1, corner.shape, generator=generator, device=corner.device)
        return inside(corner + by, self.size, x)
