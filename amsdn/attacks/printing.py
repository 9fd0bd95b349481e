"""A finished patch as files: PNG without loss, its settings as JSON beside it, a PDF that prints at a real size, and a contact sheet."""

import io
import json
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from amsdn.errors import InputError
from amsdn.records import write_atomic, write_json

LARGEST = 4096  # pixels a side
POINTS_PER_CM = 72 / 2.54
PAPERS_CM = ((21.0, 29.7), (29.7, 42.0), (42.0, 59.4), (59.4, 84.1), (84.1, 118.9))  # A4 to A0
MARGIN_CM = 2.0  # around the patch at least: room for crop marks, caption and the printer's own margin
MARK_CM, GAP_CM = 0.6, 0.2  # a crop mark's length, and its distance from the patch
CAPTION = 120  # characters, at most: what fits on A4
PRINTED = 1200  # pixels a side of the picture in the PDF, at least


def quantised(content: Tensor) -> Tensor:
    """The nearest values k/255: what a PNG can hold."""
    return content.detach().clamp(0, 1).mul(255).round().div(255)


def save_png(content: Tensor, path: Path | str) -> None:
    """Write content [3,s,s], whose values are k/255, as an 8-bit PNG. Raises InputError where it cannot be written."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: patches are saved as PNG only, which loses nothing; end the name in .png")
    assert torch.allclose(content, quantised(content), atol=1e-6), "quantise the patch before it is saved"
    buffer = io.BytesIO()
    Image.fromarray(_bytes(content)).save(buffer, format="PNG")
    _write(path, buffer.getvalue())


def load_png(path: Path | str) -> Tensor:
    """A square 8-bit RGB PNG as content [3,s,s], float32 with values k/255. Raises InputError for anything else."""
    path = Path(path)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
            if image.mode != "RGB" or width != height or width > LARGEST:
                raise InputError(f"{path}: {width}x{height} {image.mode}; a patch is a square RGB PNG of at most {LARGEST} px a side")
            pixels = np.array(image)
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such patch; make one with amsdn patch") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: not a PNG image; give the patch.png that amsdn patch writes") from e
    except Exception as e:  # Pillow's decoders raise whatever a damaged file makes them stumble on
        raise InputError(f"{path}: damaged or unreadable ({(str(e).splitlines() or [type(e).__name__])[0]}); make it again") from e
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255)


def sidecar(path: Path | str) -> Path:
    """Where the settings of the patch at ``path`` lie: patch.png -> patch.json."""
    return Path(path).with_suffix(".json")


def write_sidecar(path: Path | str, about: Mapping[str, Any]) -> None:
    """Write what is known of the patch at ``path`` beside it."""
    try:
        write_json(sidecar(path), dict(about))
    except OSError as e:
        raise InputError(f"{sidecar(path)}: cannot be written ({e.strerror or e}); choose another folder or free some space") from e


def read_sidecar(path: Path | str) -> dict[str, Any]:
    """What ``write_sidecar`` wrote; raises InputError where it is missing or no JSON object."""
    where = sidecar(path)
    try:
        about = json.loads(where.read_bytes())
    except (OSError, ValueError) as e:
        raise InputError(f"{where}: missing or not JSON ({type(e).__name__}); keep it beside the patch, or make both again") from e
    if not isinstance(about, dict):
        raise InputError(f"{where}: holds {type(about).__name__}, not a JSON object; make it again with amsdn patch")
    return about


def save_pdf(content: Tensor, path: Path | str, size_cm: float, caption: str) -> None:
    """Write a one-page PDF on which content [3,s,s] is ``size_cm`` wide, centred, with crop marks and a caption.

    The page is the smallest of A4 to A0 that leaves 2 cm around the patch, or as large as it must be. Each value of
    the patch is a flat square of many pixels there, so that nothing on the way to paper smooths it over. The bytes
    depend on the arguments alone. Raises InputError for a size that is no positive number and where the file cannot be written.
    """
    check_print_size(size_cm)
    needed = size_cm + 2 * MARGIN_CM
    width, height = next((p for p in PAPERS_CM if needed <= p[0]), (needed, needed))
    left, bottom = (width - size_cm) / 2, (height - size_cm) / 2
    texels = _bytes(content)
    times = -(-PRINTED // len(texels))
    pixels = texels.repeat(times, 0).repeat(times, 1)
    drawing = [
        f"q {_pt(size_cm)} 0 0 {_pt(size_cm)} {_pt(left)} {_pt(bottom)} cm /Patch Do Q",
        "0.5 w 0 G",
        *_crop_marks(left, bottom, size_cm),
        f"BT /F1 8 Tf {_pt(MARGIN_CM)} {_pt(bottom - GAP_CM - MARK_CM - 0.5)} Td ({_escaped(caption)}) Tj ET",
    ]
    image = f"/Type /XObject /Subtype /Image /Width {len(pixels)} /Height {len(pixels)} /ColorSpace /DeviceRGB /BitsPerComponent 8"
    page = (
        f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {_pt(width)} {_pt(height)}] /Contents 4 0 R "
        "/Resources << /XObject << /Patch 5 0 R >> /Font << /F1 6 0 R >> >> >>"
    )
    _write(
        Path(path),
        _pdf(
            b"<< /Type /Catalog /Pages 2 0 R /ViewerPreferences << /PrintScaling /None >> >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            page.encode("ascii"),
            _stream("", "\n".join(drawing).encode("latin-1")),
            _stream(image, pixels.tobytes()),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        ),
    )


def check_print_size(size_cm: float) -> None:
    """Raise InputError unless a patch can be printed ``size_cm`` wide."""
    if not 0.1 <= size_cm <= 500:
        raise InputError(f"the printed size must lie between 0.1 and 500 cm, got {size_cm:g}")


def _bytes(content: Tensor) -> np.ndarray[Any, Any]:
    """[3,s,s] in [0,1] -> uint8 [s,s,3]."""
    return content.detach().mul(255).round().to(torch.uint8).cpu().permute(1, 2, 0).contiguous().numpy()


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror or e}); choose another folder or free some space") from e


def _crop_marks(left: float, bottom: float, side: float) -> list[str]:
    """Two short lines outside each corner, in line with the patch's edges."""
    marks = []
    for x, away_x in ((left, -1), (left + side, 1)):
        for y, away_y in ((bottom, -1), (bottom + side, 1)):
            near, far = GAP_CM, GAP_CM + MARK_CM
            marks.append(f"{_pt(x + away_x * near)} {_pt(y)} m {_pt(x + away_x * far)} {_pt(y)} l S")
            marks.append(f"{_pt(x)} {_pt(y + away_y * near)} m {_pt(x)} {_pt(y + away_y * far)} l S")
    return marks


def _pt(cm: float) -> str:
    """Centimetres as PDF points."""
    return f"{cm * POINTS_PER_CM:.4f}"


def _escaped(text: str) -> str:
    """Text as the inside of a PDF string; what Latin-1 lacks becomes a question mark, what A4 lacks is cut."""
    plain = textwrap.shorten(text, CAPTION, placeholder="...").encode("latin-1", "replace").decode("latin-1")
    return plain.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


def _stream(entries: str, data: bytes) -> bytes:
    packed = zlib.compress(data)
    return f"<< {entries} /Filter /FlateDecode /Length {len(packed)} >>\nstream\n".encode("ascii") + packed + b"\nendstream"


def _pdf(*objects: bytes) -> bytes:
    """A PDF file of these objects, numbered from 1; the first is the catalogue."""
    out = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    starts = []
    for number, body in enumerate(objects, start=1):
        starts.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % start for start in starts)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(out)


@dataclass(frozen=True)
class Picture:
    """One image [3,H,W] of a contact sheet, with a line of text below it and a frame where it is to stand out."""

    image: Tensor
    text: str
    framed: bool = False


def contact_sheet(rows: Sequence[Sequence[Picture]], headings: Sequence[str], side: int = 112) -> Tensor:
    """Pictures in rows under one heading per column, each about ``side`` pixels wide: [3,H,W] with values k/255.

    Small images are enlarged by a whole factor without smoothing, so that every pixel can be seen.
    """
    pad, line, top = 6, 15, 22
    height, width = rows[0][0].image.shape[1:]
    shape = (round(side * height / max(height, width)), round(side * width / max(height, width)))
    if max(height, width) <= side:
        shape = (height * (side // max(height, width)), width * (side // max(height, width)))
    cell = shape[1] + 2 * pad, shape[0] + line + 2 * pad
    sheet = Image.new("RGB", (max(len(r) for r in rows) * cell[0], top + len(rows) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for column, heading in enumerate(headings):
        draw.text((column * cell[0] + pad, 5), heading, "black", font=font)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            x, y = j * cell[0] + pad, top + i * cell[1] + pad
            small = Image.fromarray(_bytes(picture.image))
            sheet.paste(small.resize((shape[1], shape[0]), Image.Resampling.NEAREST), (x, y))
            if picture.framed:
                draw.rectangle((x - 3, y - 3, x + shape[1] + 2, y + shape[0] + 2), outline="#c8102e", width=2)
            draw.text((x, y + shape[0] + 3), picture.text, "#c8102e" if picture.framed else "black", font=font)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1).float().div(255)
