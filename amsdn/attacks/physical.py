"""What happens to a printed patch between the printer and the classifier, drawn at random and differentiable.

Expectation over transformations (EOT; Athalye et al., ICML 2018) asks for three things: random parameters, a rendering
that is differentiable in the patch, and an evaluation under parameters that were never trained on. A draw takes the
content through the printer and the light (tone, colour, contrast, brightness), tilts, turns and scales it into a
``size`` x ``size`` window, blurs it there, adds sensor noise, and lays the window anywhere over the image. So only
pixels of that window change, whatever is drawn, and every result is a member of ``PatchRegion(size)``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from amsdn.attacks.patch_attacks import cut, paste
from amsdn.errors import InputError

Range = tuple[float, float]

SUPERSAMPLE = 4  # points a side at which each pixel samples the print: a pixel integrates the light over its area
DISTANCE = 4.0  # from the camera to the patch, in half sides of the patch: at arm's length, so that tilt shows
BOX = math.sqrt(12)  # the length of a box over its standard deviation
WIDER = 1.25  # how far the held-out ranges reach beyond those trained on
LIMITS = {"rotation": 180.0, "tilt": 75.0, "brightness": 0.9, "contrast": 0.9, "tone": 0.25, "gain": 0.9, "offset": 0.9}


@dataclass(frozen=True)
class Blur(ABC):
    """A blur of random width, in pixels of the image; (0, 0) is none."""

    width: Range = (0.0, 0.0)  # of the blur, pixels of the image

    def __post_init__(self) -> None:
        low, high = self.width
        if not 0 <= low <= high < math.inf:
            raise InputError(f"{type(self).__name__}: width must satisfy 0 <= low <= high, in pixels, got {self.width}")

    @abstractmethod
    def along_axes(self, width: Tensor, coin: Tensor) -> Tensor:
        """width [N], fair coin [N] bool -> the width along rows and columns, [N,2]."""

    @abstractmethod
    def weights(self, offset: Tensor, width: Tensor) -> Tensor:
        """How much light a pixel takes from ``offset`` pixels away, up to a factor; the arguments broadcast."""

    @abstractmethod
    def held_out(self) -> "Blur":
        """A blur of another kind and the same spread, measured by the standard deviation along an axis."""


@dataclass(frozen=True)
class GaussianBlur(Blur):
    """Out of focus: a Gaussian; the width is its standard deviation."""

    def along_axes(self, width: Tensor, coin: Tensor) -> Tensor:
        return torch.stack([width, width], 1)

    def weights(self, offset: Tensor, width: Tensor) -> Tensor:
        return (-0.5 * (offset / width.clamp_min(1e-3)).square()).exp()

    def held_out(self) -> "MotionBlur":
        low, high = self.width
        return MotionBlur((BOX * low, BOX * high))


@dataclass(frozen=True)
class MotionBlur(Blur):
    """A moving camera: a box of this width along rows or columns, whichever a coin says."""

    def along_axes(self, width: Tensor, coin: Tensor) -> Tensor:
        return torch.stack([width * coin, width * ~coin], 1)

    def weights(self, offset: Tensor, width: Tensor) -> Tensor:
        return ((width + 1) / 2 - offset.abs()).clamp(0, 1)

    def held_out(self) -> "GaussianBlur":
        low, high = self.width
        return GaussianBlur((low / BOX, high / BOX))


@dataclass(frozen=True, eq=False)
class Draws:
    """The parameters of N random transformations into a window of ``size`` pixels; all tensors on one device."""

    size: int
    scale: Tensor  # [N] side of the warped patch's bounding square / size
    rotation: Tensor  # [N] radians, counter-clockwise as seen
    tilt: Tensor  # [N,2] radians, about the vertical and the horizontal axis of the image
    shift: Tensor  # [N,2] in [-1,1]: where in its window the warped patch lies, as a share of the room left
    place: Tensor  # [N,2] in [0,1): where in the image the window lies, row and column, as a share of the room left
    fixed: tuple[int, int] | None  # the window's top-left corner where it is always the same
    brightness: Tensor  # [N]
    contrast: Tensor  # [N]
    tone: Tensor  # [N,3]
    gain: Tensor  # [N,3]
    offset: Tensor  # [N,3]
    blur: Blur
    blur_width: Tensor  # [N,2] pixels, along rows and columns
    noise: Tensor | None  # [N,3,size,size]

    def corners(self, height: int, width: int) -> Tensor:
        """The window's top-left corner, row and column, [N,2] int64. Raises InputError where it does not fit."""
        if self.size > min(height, width):
            raise InputError(f"a patch of {self.size} px does not fit images of {height}x{width}; choose a smaller size")
        rooms = (height - self.size, width - self.size)
        if self.fixed is None:  # the product may round up to room + 1
            free = [(share * (room + 1)).long().clamp(max=room) for share, room in zip(self.place.unbind(1), rooms, strict=True)]
            return torch.stack(free, 1)
        row, column = self.fixed
        if row > rooms[0] or column > rooms[1]:
            raise InputError(f"a patch of {self.size} px at {self.fixed} does not fit images of {height}x{width}; choose another place")
        return torch.stack([torch.full_like(self.place[:, 0], at, dtype=torch.int64) for at in self.fixed], 1)


@dataclass(frozen=True)
class Transformations:
    """Ranges of random transformations; the defaults change nothing but the place.

    ``scale`` is the range of the side of the square that bounds the warped patch, as a share of the patch's ``size``
    in pixels: at 1 the patch, however turned and tilted, just fits its window, so an upright one is ``size`` pixels
    wide. ``noise`` is the standard deviation of the sensor's noise. Every other pair (a, b) gives a strength between a and b, with a
    random sign. All values are in units of pixel value in [0,1] unless said otherwise.

    Light and colour act on the patch alone and not on the scene around it: the threat allows no other change, and the
    scene may be lit as it likes. For print colour, Athalye et al. use an affine map; we add a tone curve, since a
    printer's dot gain moves mid-tones most. It is the parabola c + 4 t c (1 - c) rather than a power, whose slope at
    black is infinite. Eykholt et al. (CVPR 2018) sample photographs of the real scene instead.
    """

    scale: Range = (1.0, 1.0)
    rotation: Range = (0.0, 0.0)  # degrees in the plane, up to 180
    tilt: Range = (0.0, 0.0)  # degrees out of the plane, about each axis: perspective, up to 75
    brightness: Range = (0.0, 0.0)  # added
    contrast: Range = (0.0, 0.0)  # 0.2: the distance from mid-grey times 0.8 or 1.2
    tone: Range = (0.0, 0.0)  # what a mid-grey is printed too light or too dark, each channel for itself, up to 0.25
    gain: Range = (0.0, 0.0)  # 0.2: a channel times 0.8 or 1.2
    offset: Range = (0.0, 0.0)  # added to a channel
    noise: float = 0.0
    blur: Blur = GaussianBlur()
    place: tuple[int, int] | None = None  # the window's top-left corner (row, column); None: anywhere

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise InputError(f"Transformations: scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        for name, limit in LIMITS.items():
            low, high = getattr(self, name)
            if not 0 <= low <= high <= limit:
                raise InputError(f"Transformations: {name} must satisfy 0 <= low <= high <= {limit:g}, got {(low, high)}")
        if not 0 <= self.noise < 1:
            raise InputError(f"Transformations: noise must lie in [0, 1), got {self.noise}")
        if self.place is not None and min(self.place) < 0:
            raise InputError(f"Transformations: place must be a row and a column from 0, got {self.place}")

    def sample(self, count: int, size: int, generator: torch.Generator) -> Draws:
        """``count`` independent draws for a window of ``size`` pixels, on the generator's device."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(count, *shape, generator=generator, device=generator.device)

        def between(limits: Range) -> Tensor:
            return limits[0] + (limits[1] - limits[0]) * uniform()

        def two_sided(limits: Range, *shape: int) -> Tensor:
            u = 2 * uniform(*shape) - 1
            return torch.where(u < 0, -1.0, 1.0) * (limits[0] + (limits[1] - limits[0]) * u.abs())

        return Draws(
            size=size,
            scale=between(self.scale),
            rotation=two_sided(self.rotation) * (math.pi / 180),
            tilt=two_sided(self.tilt, 2) * (math.pi / 180),
            shift=2 * uniform(2) - 1,
            place=uniform(2),
            fixed=self.place,
            brightness=two_sided(self.brightness),
            contrast=1 + two_sided(self.contrast),
            tone=two_sided(self.tone, 3),
            gain=1 + two_sided(self.gain, 3),
            offset=two_sided(self.offset, 3),
            blur=self.blur,
            blur_width=self.blur.along_axes(between(self.blur.width), uniform() < 0.5),
            noise=self.noise * torch.randn(count, 3, size, size, generator=generator, device=generator.device) if self.noise else None,
        )

    def held_out(self) -> "Transformations":
        """Transformations that training with this never sees: just beyond each range, and another kind of blur.

        A strength in (a, b) becomes one in (b, 1.25 b), as far as the limits allow; what was not varied stays as it is.
        The scale keeps its range, since it is the size of the patch: how a smaller one does is another question. A free
        place has no outside.
        """

        def beyond(name: str) -> Range:
            high = getattr(self, name)[1]
            return high, min(WIDER * high, LIMITS[name])

        ranges = {name: beyond(name) for name in LIMITS}
        return replace(self, noise=min(WIDER * self.noise, 0.99), blur=self.blur.held_out(), **ranges)  # type: ignore[arg-type]


NONE = Transformations()  # the patch as it is, anywhere
DIGITAL = Transformations(scale=(0.8, 1.0), rotation=(0.0, 22.5), brightness=(0.0, 0.1))  # the angle of Brown et al.'s code
PHYSICAL = Transformations(
    scale=(0.7, 1.0),
    rotation=(0.0, 22.5),
    tilt=(0.0, 30.0),
    brightness=(0.0, 0.15),
    contrast=(0.0, 0.2),
    tone=(0.0, 0.08),
    gain=(0.0, 0.15),
    offset=(0.0, 0.05),
    noise=0.02,
    blur=GaussianBlur((0.0, 0.7)),
)


def apply(x: Tensor, patch: Tensor, draws: Draws) -> Tensor:
    """x [N,3,H,W] seen with the patch [3,s,s] (or one each, [N,3,s,s]), image i under draw i; differentiable in the patch."""
    paint, cover = render(patch, draws)
    corner = draws.corners(x.shape[2], x.shape[3])
    window = cut(x, corner, draws.size) * (1 - cover) + paint
    excess = (window - window.clamp(0, 1)).detach()  # noise, and the rounding of the sum, which must not stop the gradient
    return paste(x, window - excess, corner)


def render(patch: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """The window of each draw: its light [N,3,size,size] and the share of each pixel that the patch covers [N,1,size,size].

    A pixel of a scene x becomes x (1 - cover) + light. Both are the mean over ``SUPERSAMPLE`` squared points in the
    pixel, each of which sees one flat square of the print or, past its edge, the scene.
    """
    count, size = len(draws.scale), draws.size
    patch = patch.expand(count, -1, -1, -1) if patch.ndim == 3 else patch
    with torch.autocast(patch.device.type, enabled=False):  # places and colours keep their precision beside a bfloat16 model
        inked = torch.cat([_print(patch, draws), torch.ones_like(patch[:, :1])], 1)
        grid = _grid(draws).to(patch.dtype)
        points = F.grid_sample(inked, grid, "nearest", "zeros", align_corners=False)
        window = F.avg_pool2d(points.double(), SUPERSAMPLE).to(patch.dtype)  # in double the mean of equal values is that value
        if draws.blur.width[1]:
            rows, columns = (_blur_matrix(draws.blur, width, size).to(patch.dtype).unsqueeze(1) for width in draws.blur_width.unbind(1))
            window = rows @ window @ columns.mT
        paint, cover = window[:, :3], window[:, 3:]
        return (paint if draws.noise is None else paint + cover * draws.noise), cover


def _print(patch: Tensor, draws: Draws) -> Tensor:
    """The patch's colours [N,3,s,s] as printed and lit."""
    tone, gain, offset = (t.reshape(-1, 3, 1, 1) for t in (draws.tone, draws.gain, draws.offset))
    contrast, brightness = (t.reshape(-1, 1, 1, 1) for t in (draws.contrast, draws.brightness))
    printed = _limited((patch + 4 * tone * patch * (1 - patch)) * gain + offset)
    return _limited(printed * contrast + 0.5 * (1 - contrast) + brightness)


def _limited(colour: Tensor) -> Tensor:
    """Colours clamped to [0,1] with a gradient up to the limits themselves.

    The gradient of torch.clamp is zero there in some versions (2.15 for one): black and white, where most values of a
    patch end up, would then never change again.
    """
    return torch.where((colour >= 0) & (colour <= 1), colour, colour.detach().clamp(0, 1))


def _grid(draws: Draws) -> Tensor:
    """Where in the patch each point of the window looks, in [-1,1] inside the patch: [N,size*k,size*k,2] as (column, row)."""
    side = draws.size * SUPERSAMPLE
    axis = (2 * torch.arange(side, device=draws.scale.device) + 1) / side - 1
    m1, m2, m3 = _homography(draws).unbind(2)
    # The inverse up to a factor, which perspective ignores: no division, exact where nothing is turned or tilted.
    inverse = torch.stack([torch.linalg.cross(m2, m3), torch.linalg.cross(m3, m1), torch.linalg.cross(m1, m2)], 1)
    # Sums, not a matrix product, which an accelerator may round to a few digits.
    a, b, c = inverse.unsqueeze(3).unsqueeze(4).unbind(2)  # [N,3,1,1] each
    u, v, w = (a * axis + b * axis.unsqueeze(1) + c).unbind(1)
    return torch.stack([u / w, v / w], -1)


def _homography(draws: Draws) -> Tensor:
    """From the patch to the window, both [-1,1] a side, as matrices on (column, row, 1): [N,3,3].

    A pinhole camera looks at the turned and tilted plane; what it sees is scaled so that the longer side of its
    bounding box is ``scale``, and laid where ``shift`` says.
    """
    (cos_r, sin_r), (cos_v, sin_v), (cos_h, sin_h) = ((a.cos(), a.sin()) for a in (-draws.rotation, *draws.tilt.unbind(1)))

    def seen(x: Tensor, y: Tensor) -> Tensor:  # a direction in the plane after both tilts
        return torch.stack([x * cos_v, y * cos_h + x * sin_v * sin_h, y * sin_h - x * sin_v * cos_h], 1)

    nowhere = torch.zeros_like(cos_r)
    across, up, centre = seen(cos_r, sin_r), seen(-sin_r, cos_r), torch.stack([nowhere, nowhere, nowhere + DISTANCE], 1)
    camera = torch.stack([across, up, centre], 2)
    left, right = centre - across, centre + across
    image = torch.stack([left - up, left + up, right - up, right + up], 2)  # where the corners are seen
    low, high = (image[:, :2] / image[:, 2:]).aminmax(dim=2)
    middle, half = (low + high) / 2, (high - low) / 2
    zoom = (draws.scale / half.amax(1)).unsqueeze(1)
    move = draws.shift * (1 - zoom * half).clamp_min(0) - zoom * middle
    flat = zoom.unsqueeze(2) * camera[:, :2] + move.unsqueeze(2) * camera[:, 2:]
    return torch.cat([flat, camera[:, 2:]], 1)


def _blur_matrix(blur: Blur, width: Tensor, size: int) -> Tensor:
    """The blur of ``size`` pixels in a row as a matrix for each width [N]: [N,size,size]. Light may leave the window."""
    i = torch.arange(size, device=width.device)
    far = math.ceil(4 * blur.width[1]) + 1
    reach = torch.arange(-far, far + 1, device=width.device)
    width = width.reshape(-1, 1, 1)
    total = blur.weights(reach.reshape(1, 1, -1), width).sum(2, keepdim=True)
    return blur.weights((i.unsqueeze(1) - i).unsqueeze(0), width) / total
