"""A patch as files: nothing is lost in the PNG, and the PDF prints at the size that was asked for."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from amsdn.attacks.printing import (
    Picture,
    contact_sheet,
    load_png,
    quantised,
    read_sidecar,
    save_pdf,
    save_png,
    sidecar,
    write_sidecar,
)
from amsdn.errors import InputError


def content(size: int = 5) -> Tensor:
    return quantised(torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("size", [1, 5, 50])
def test_png_round_trip_is_exact(size: int, tmp_path: Path) -> None:
    save_png(content(size), tmp_path / "p.png")
    assert torch.equal(load_png(tmp_path / "p.png"), content(size))


def test_every_value_of_eight_bits_survives(tmp_path: Path) -> None:
    levels = (torch.arange(256).float() / 255).reshape(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(quantised(levels), levels)
    save_png(levels, tmp_path / "p.png")
    assert torch.equal(load_png(tmp_path / "p.png"), levels)


def pdf_objects(data: bytes) -> dict[int, tuple[bytes, bytes]]:
    """Number -> (dictionary, unpacked stream), found through the cross-reference table as a reader does."""
    start = int(re.search(rb"startxref\n(\d+)\n%%EOF\n$", data)[1])  # type: ignore[index]
    count = int(re.match(rb"xref\n0 (\d+)\n", data[start:])[1])  # type: ignore[index]
    entries = data[start:].split(b"\n")[2 : 2 + count]
    assert all(len(e) == 19 for e in entries)  # twenty bytes with the line end, as the format demands
    found = {}
    for number, entry in enumerate(entries[1:], start=1):
        body = data[int(entry[:10]) :]
        assert body.startswith(b"%d 0 obj\n" % number)
        body = body[: body.index(b"\nendobj")]
        head, _, stream = body.partition(b"stream\n")
        if stream:
            length = int(re.search(rb"/Length (\d+)", head)[1])  # type: ignore[index]
            assert stream[length:] == b"\nendstream"
            stream = zlib.decompress(stream[:length])
        found[number] = (head, stream)
    return found


@pytest.mark.parametrize(
    ("size_cm", "page_cm"),
    [(10.0, (21.0, 29.7)), (17.0, (21.0, 29.7)), (17.1, (29.7, 42.0)), (80.0, (84.1, 118.9)), (100.0, (104.0, 104.0))],
)
def test_pdf_prints_at_its_real_size(size_cm: float, page_cm: tuple[float, float], tmp_path: Path) -> None:
    save_pdf(content(), tmp_path / "p.pdf", size_cm, "a (strange) \\ caption, 10 cm × 10 cm →")
    objects = pdf_objects((tmp_path / "p.pdf").read_bytes())
    box = [float(v) for v in re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", objects[3][0]).groups()]  # type: ignore[union-attr]
    assert box == pytest.approx([v / 2.54 * 72 for v in page_cm], abs=1e-3)
    drawing = objects[4][1].decode("latin-1")
    matrix = [float(v) for v in re.search(r"q ([-\d. ]+) cm /Patch Do Q", drawing)[1].split()]  # type: ignore[index]
    side = size_cm / 2.54 * 72
    assert matrix[:4] == pytest.approx([side, 0, 0, side], abs=1e-3)
    assert matrix[4:] == pytest.approx([(box[0] - side) / 2, (box[1] - side) / 2], abs=1e-3)  # centred
    assert r"(a \(strange\) \\ caption, 10 cm × 10 cm ?) Tj" in drawing

    head, pixels = objects[5]
    width = int(re.search(rb"/Width (\d+)", head)[1])  # type: ignore[index]
    picture = torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(width, width, 3).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(picture, content().repeat_interleave(width // 5, 1).repeat_interleave(width // 5, 2))
    assert width == 1200


def test_crop_marks_lie_in_line_with_the_edges_and_off_the_patch(tmp_path: Path) -> None:
    save_pdf(content(), tmp_path / "p.pdf", 10, "")
    drawing = pdf_objects((tmp_path / "p.pdf").read_bytes())[4][1].decode()
    left, bottom, side = (v * 72 / 2.54 for v in (5.5, 9.85, 10.0))
    lines = [[float(v) for v in m] for m in re.findall(r"([\d.]+) ([\d.]+) m ([\d.]+) ([\d.]+) l S", drawing)]
    assert len(lines) == 8
    for x1, y1, x2, y2 in lines:
        upright = abs(x1 - x2) < 1e-3
        edges = (left, left + side) if upright else (bottom, bottom + side)
        assert min(abs((x1 if upright else y1) - e) for e in edges) < 1e-3
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        assert not (left <= middle[0] <= left + side and bottom <= middle[1] <= bottom + side)


def test_a_long_caption_stays_on_the_page(tmp_path: Path) -> None:
    save_pdf(content(), tmp_path / "p.pdf", 10, "word " * 100)
    drawing = pdf_objects((tmp_path / "p.pdf").read_bytes())[4][1].decode()
    shown = re.search(r"\((.*)\) Tj", drawing)[1]  # type: ignore[index]
    assert shown.endswith("...")
    assert len(shown) <= 120


def test_same_patch_same_bytes(tmp_path: Path) -> None:
    for name in ("a.pdf", "b.pdf"):
        save_pdf(content(), tmp_path / name, 10, "x")
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


def test_sidecar_round_trip(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "p.png", {"a": [1, 2]})
    assert sidecar(tmp_path / "p.png") == tmp_path / "p.json"
    assert read_sidecar(tmp_path / "p.png") == {"a": [1, 2]}


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "jpeg", "grey", "oblong", "alpha", "16 bit"])
def test_bad_patch_files_are_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    rng = np.random.default_rng(0)
    shape = {"grey": (8, 8), "oblong": (8, 9, 3), "alpha": (8, 8, 4)}.get(kind, (64, 64, 3))
    if kind == "16 bit":
        Image.fromarray(rng.integers(0, 60000, (8, 8), dtype=np.uint16)).save(path)
    elif kind != "missing":
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path, format="JPEG" if kind == "jpeg" else "PNG")
    if kind == "text":
        path.write_text("not an image")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"p\.png: ") as e:
        load_png(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", [None, "{", "[1]", "\udcff"])
def test_bad_sidecars_are_one_line(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "p.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"p\.json: ") as e:
        read_sidecar(tmp_path / "p.png")
    assert "\n" not in str(e.value)


def test_unusable_names_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="PNG only"):
        save_png(content(), tmp_path / "p.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_png(content(), tmp_path / "file" / "p.png")
    for size in (0.0, -1.0, 1e6, float("nan")):
        with pytest.raises(InputError, match="printed size must lie between"):
            save_pdf(content(), tmp_path / "p.pdf", size, "")


def test_contact_sheet_shows_every_pixel(tmp_path: Path) -> None:
    picture = content(8)
    sheet = contact_sheet([[Picture(picture, "cat 0.90"), Picture(picture, "dog 0.60", framed=True)]] * 2, ["clean", "patched"])
    large = picture.repeat_interleave(14, 1).repeat_interleave(14, 2)  # 112 / 8
    assert torch.equal(sheet[:, 28 : 28 + 112, 6 : 6 + 112], large)
    assert sheet.shape == (3, 22 + 2 * (112 + 15 + 12), 2 * (112 + 12))
    assert (sheet[0, 25, 130:250] > 0.7).all()  # the frame is red
    assert json.dumps(sheet.shape)
