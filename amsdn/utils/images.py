"""Image files to tensors and back. What cannot be read without changing its meaning is refused, not guessed at."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from amsdn.errors import InputError
from amsdn.records import write_atomic

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SMALLEST = 8  # pixels a side; below this there is nothing to classify
LARGEST = 2**26  # pixels; 200 MB once decoded
MODES = ("1", "L", "P", "RGB", "LA", "PA", "RGBA")  # at most eight bits a channel, and grey or RGB

# Pillow only warns of an image between its limit and twice its limit. An error here is one line for the user instead
# of two; catching the warning around each call would not be safe in the threads that decode folders.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def read_image(path: Path | str, image_size: int | None = None, *, rgb_only: bool = False) -> Tensor:
    """An image file as float32 [3,H,W] in [0,1]: RGB, upright after its EXIF orientation, grey repeated to three channels.

    With ``image_size`` it is the largest centred square of the image, resized to that many pixels a side (bilinear,
    antialiased). Without, every value is exactly k/255. Colour profiles are not applied. Raises InputError for what
    is missing, damaged, no image, larger than 64 megapixels or smaller than 8 pixels a side, and for what eight-bit
    RGB cannot hold: 16-bit and floating-point samples, CMYK, transparency, animations; with ``rgb_only`` also for grey images
    and for any alpha channel, which a single prediction should not silently turn into something else.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=FORMATS) as opened:
            _check_header(opened, path)
            if rgb_only and opened.mode not in ("RGB", "P"):
                raise InputError(f"{path}: colour mode {opened.mode} is not RGB (grey or with alpha); convert it to 8-bit RGB first")
            image = _opaque_rgb(ImageOps.exif_transpose(opened), path)
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such image file; check the path") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: not an image that can be read; give one of {', '.join(FORMATS)}") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise _too_large(path) from e
    except Exception as e:  # Pillow's decoders raise whatever a damaged file makes them stumble on
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: the image is damaged or unreadable ({reason}); replace or remove it") from e
    if image_size is not None:
        image = _centre_square(image, image_size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


def to_pil(image: Tensor) -> Image.Image:
    """A float tensor [3,H,W] or [1,H,W] in [0,1], on any device, as an 8-bit RGB or grey Pillow image."""
    assert image.ndim == 3, f"image has shape {list(image.shape)}, not [3,H,W]"
    assert image.shape[0] in (1, 3), f"image has shape {list(image.shape)}, not [3,H,W]"
    low, high = (float(v) for v in image.detach().aminmax())
    assert low >= 0 <= high <= 1, f"pixels lie in [{low:.3g}, {high:.3g}], not in [0,1]"
    pixels = image.detach().float().mul(255).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def save_image(image: Tensor, path: Path | str) -> None:
    """Write [3,H,W] or [1,H,W] in [0,1] as PNG, whole or not at all. Raises InputError if it cannot be written there."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: images are saved as PNG only, which loses nothing; end the name in .png")
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); choose another folder or free some space") from e


def _check_header(image: Image.Image, path: Path) -> None:
    """Everything that can be refused before pixels are decoded."""
    width, height = image.size
    if min(width, height) < SMALLEST:
        raise InputError(f"{path}: the image is {width}x{height} px; the smallest that can be used is {SMALLEST}x{SMALLEST}")
    if width * height > LARGEST:
        raise _too_large(path)
    if _bits_per_channel(image) > 8:
        raise InputError(f"{path}: more than 8 bits a channel (mode {image.mode}); convert it to 8-bit RGB, choosing how to scale it")
    if image.mode not in MODES:
        raise InputError(f"{path}: colour mode {image.mode} is not grey or RGB; convert it to 8-bit RGB")
    # A phone's JPEG may carry a depth or gain map as a second picture (MPO); the first is the photograph.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise InputError(f"{path}: holds several frames; save the one that is meant as an image of its own")


def _too_large(path: Path) -> InputError:
    return InputError(f"{path}: more than {LARGEST / 1e6:.0f} megapixels; resize it first")


def _bits_per_channel(image: Image.Image) -> int:
    """The file's own sample depth. Pillow quietly narrows 16-bit RGB to a mode that looks like any other."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return 32 if image.mode in ("I", "F") else 16
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]  # 258: BitsPerSample
    # In PNG the decoder's raw mode names the stored depth, for instance "RGB;16B".
    return 16 if image.format == "PNG" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ())) else 8


def _opaque_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
            raise InputError(f"{path}: the image has transparent pixels; flatten it onto a background of your choice first")
    return image.convert("RGB")


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
