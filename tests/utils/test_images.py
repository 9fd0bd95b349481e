import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amsdn.errors import InputError
from amsdn.utils import images as module
from amsdn.utils.images import read_image, save_image, to_pil


def noise(height=12, width=10, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def refusal(path, message):
    with pytest.raises(InputError, match=message) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_rgb_is_read_exactly(tmp_path, suffix):
    Image.fromarray(noise()).save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image, as_tensor(noise()))


def test_lossless_webp_and_a_name_as_text(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "x.webp", lossless=True)
    assert torch.equal(read_image(str(tmp_path / "x.webp")), as_tensor(noise()))


def test_grey_and_bilevel_repeat_to_three_channels(tmp_path):
    grey = noise(channels=1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png"), as_tensor(np.stack([grey] * 3, -1)))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert torch.equal(read_image(tmp_path / "bits.png")[0], torch.from_numpy(grey > 127).float())


def test_palette_becomes_its_colours(tmp_path):
    palette = Image.fromarray(noise(channels=1) // 64).convert("P")
    colours = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
    palette.putpalette(colours + [0] * (768 - 12))
    for name in ("x.png", "x.gif"):
        palette.save(tmp_path / name)
        expected = np.array(colours, np.uint8).reshape(4, 3)[noise(channels=1) // 64]
        assert torch.equal(read_image(tmp_path / name), as_tensor(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path, mode):
    image = Image.fromarray(noise()).convert(mode)
    image.save(tmp_path / "opaque.png")
    expected = np.array(Image.fromarray(noise()).convert(mode[:-1]).convert("RGB"))
    assert torch.equal(read_image(tmp_path / "opaque.png"), as_tensor(expected))
    alpha = Image.new("L", image.size, 255)
    alpha.putpixel((3, 4), 254)
    image.putalpha(alpha)
    image.save(tmp_path / "clear.png")
    refusal(tmp_path / "clear.png", "transparent pixels; flatten it")


def test_colour_key_and_palette_transparency(tmp_path):
    pixels = noise()
    pixels[0, 0] = (1, 2, 3)
    Image.fromarray(pixels).save(tmp_path / "key.png", transparency=(1, 2, 3))
    refusal(tmp_path / "key.png", "transparent pixels")
    grey = Image.fromarray(noise(channels=1)).convert("P")
    grey.save(tmp_path / "palette.png", transparency=int(noise(channels=1)[0, 0]))
    refusal(tmp_path / "palette.png", "transparent pixels")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation):
    upright = Image.fromarray(noise())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, to be shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "x.png"), as_tensor(noise()))


def png16(path, colour_type):
    """A 16-bit PNG by hand: Pillow cannot write 16-bit colour."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 16, 16, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + bytes(range(2 * channels)) * 16) * 16
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6], ids=["grey", "rgb", "grey+alpha", "rgba"])
def test_16_bit_png_is_refused_not_narrowed(tmp_path, colour_type):
    png16(tmp_path / "deep.png", colour_type)
    refusal(tmp_path / "deep.png", "more than 8 bits a channel")


def tiff16(path):
    """An uncompressed 16-bit RGB TIFF of 8x8 pixels by hand, little-endian."""
    data = bytes(8 * 8 * 6)
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 8 + len(data)), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, len(data))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data) + 6) + data + struct.pack("<HHH", 16, 16, 16) + directory)


def test_16_bit_tiff_is_refused(tmp_path):
    tiff16(tmp_path / "rgb.tiff")
    refusal(tmp_path / "rgb.tiff", "more than 8 bits a channel")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "grey.tiff")
    refusal(tmp_path / "grey.tiff", "more than 8 bits a channel")


@pytest.mark.parametrize(
    ("mode", "message"), [("F", "more than 8 bits"), ("I", "more than 8 bits"), ("CMYK", "mode CMYK is not grey or RGB")]
)
def test_other_modes_are_refused(tmp_path, mode, message):
    Image.new(mode, (16, 16)).save(tmp_path / "x.tiff")
    refusal(tmp_path / "x.tiff", message)


def test_cmyk_jpeg_is_refused(tmp_path):
    Image.new("CMYK", (16, 16)).save(tmp_path / "x.jpg")
    refusal(tmp_path / "x.jpg", "mode CMYK")


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_images_too_small_to_classify(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    refusal(tmp_path / "x.png", f"the image is {size[0]}x{size[1]} px; the smallest that can be used is 8x8")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refusal(path, "damaged or unreadable|not an image")


def test_what_is_no_image(tmp_path):
    for name, content in (("empty.png", b""), ("text.jpg", b"hello"), ("script.png", b"%!PS-Adobe-3.0\n")):
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name, "not an image that can be read")
    refusal(tmp_path / "missing.png", "no such image file")
    refusal(tmp_path, "damaged or unreadable")


def huge_png(path, side):
    """A PNG whose header promises side x side pixels; nothing behind it needs to be true."""
    png16(path, 0)
    data = bytearray(path.read_bytes())
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("side", [8_200, 10_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(tmp_path, side):
    huge_png(tmp_path / "bomb.png", side)
    refusal(tmp_path / "bomb.png", "more than 67 megapixels")


def test_animations_are_refused_and_phone_jpegs_are_not(tmp_path):
    frames = [Image.fromarray(noise()), Image.fromarray(255 - noise())]
    for name in ("x.gif", "x.png", "x.tiff", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        refusal(tmp_path / name, "several frames")
    frames[0].save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    buffer = io.BytesIO()
    frames[0].save(buffer, format="JPEG")
    assert torch.equal(read_image(tmp_path / "x.jpg"), as_tensor(np.array(Image.open(buffer))))


def test_resizing_takes_the_centre_square(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (10, 200, 60)  # only the centred square has colour
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        for size in (8, 16, 20):
            image = read_image(tmp_path / name, size)
            assert image.shape == (3, size, size)
            assert torch.equal(image, (torch.tensor([10, 200, 60]) / 255).reshape(3, 1, 1).expand(3, size, size))


def test_the_right_size_is_not_resampled(tmp_path):
    Image.fromarray(noise(16, 16)).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png", 16), as_tensor(noise(16, 16)))


def test_save_and_read_round_trip(tmp_path):
    colour = as_tensor(noise())
    save_image(colour, tmp_path / "new" / "x.png")
    assert torch.equal(read_image(tmp_path / "new" / "x.png"), colour)
    save_image(colour[:1], tmp_path / "grey.PNG")
    with Image.open(tmp_path / "grey.PNG") as written:
        assert written.mode == "L"
    assert torch.equal(read_image(tmp_path / "grey.PNG"), colour[:1].repeat(3, 1, 1))


def test_to_pil_rounds_to_the_nearest_and_checks():
    image = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0]).reshape(1, 1, 4).repeat(3, 1, 1).requires_grad_()
    assert [p[0] for p in np.array(to_pil(image))[0].tolist()] == [0, 0, 1, 255]
    with pytest.raises(AssertionError, match=r"not \[3,H,W\]"):
        to_pil(torch.zeros(1, 3, 8, 8))
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(AssertionError, match=r"not in \[0,1\]"):
            to_pil(torch.full((3, 8, 8), bad))


def test_save_refuses_other_formats_and_unwritable_places(tmp_path):
    with pytest.raises(InputError, match="PNG only"):
        save_image(torch.zeros(3, 8, 8), tmp_path / "x.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written") as error:
        save_image(torch.zeros(3, 8, 8), tmp_path / "file" / "x.png")
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_image(torch.zeros(3, 8, 8), tmp_path / "x.png")

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(InputError, match="No space left"):
        save_image(torch.ones(3, 8, 8), tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").max() == 0
