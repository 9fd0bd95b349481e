import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from amsdn.evaluation import figures
from amsdn.evaluation.figures import BOTTOM, LEFT, RIGHT, TOP, Axis, Curve, Point

AXIS = Axis("budget", 0.0, 4.0, ((0.0, "0"), (2.0, "2"), (4.0, "4")))


def decode(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))


def coordinates(element: ET.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in element.attrib["points"].split()]


def drawn(svg: str, tag: str, kind: str) -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(tag) if e.attrib.get("class", "").split()[:1] == [kind]]


def test_chart_puts_points_where_the_axes_say() -> None:
    svg = figures.line_chart([Curve("run", (Point(4, 0.0), Point(0, 1.0), Point(2, 0.5)))], AXIS, description="d", y_title="y")
    (line,) = drawn(svg, "polyline", "line")
    assert coordinates(line) == [(LEFT, TOP), ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2), (RIGHT, BOTTOM)]


def test_band_follows_the_intervals_and_needs_two() -> None:
    banded = Curve("run", (Point(0, 0.5, 0.0, 1.0), Point(4, 0.5, 0.25, 0.75)))
    (band,) = drawn(figures.line_chart([banded], AXIS, description="d", y_title="y"), "polygon", "band")
    height = BOTTOM - TOP
    assert coordinates(band) == [(LEFT, TOP), (RIGHT, TOP + height / 4), (RIGHT, BOTTOM - height / 4), (LEFT, BOTTOM)]
    bare = Curve("run", (Point(0, 0.5, 0.0, 1.0), Point(4, 0.5)))
    assert not drawn(figures.line_chart([bare], AXIS, description="d", y_title="y"), "polygon", "band")


def test_runs_differ_in_marker_as_well_as_colour() -> None:
    marks = [re.sub(r"s\d|[\d.,-]+", "", str(figures.swatch(slot)).split("/>")[1]) for slot in range(4)]
    points = [str(figures.swatch(slot)).split("/>")[1].count(",") for slot in range(4)]
    assert len(set(zip(marks, points, strict=True))) == 4


def test_text_in_charts_is_escaped() -> None:
    axis = Axis("<i>&", 0.0, 1.0, ((0.0, "<b>"),))
    svg = figures.line_chart([Curve("<u>", (Point(0, 1.0),))], axis, description='"><script>', y_title="<s>")
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == '"><script>'
    assert {e.text for e in root.iter("text")} >= {"<i>&", "<b>", "<s>"}


def test_crowded_tick_labels_are_thinned() -> None:
    ticks = tuple((i / 100, str(i)) for i in range(101))
    svg = figures.line_chart([Curve("run", (Point(0, 1.0),))], Axis("x", 0.0, 1.0, ticks), description="d", y_title="y")
    places = [float(e.attrib["x"]) for e in drawn(svg, "text", "tick") if e.attrib["text-anchor"] == "middle"]
    assert len(places) > 5
    assert min(np.diff(places)) >= figures.MIN_TICK_GAP - 0.1


def test_strip_draws_one_mark_per_measured_run() -> None:
    svg = figures.interval_strip([Point(0.5, 0.5, 0.25, 1.0), None, Point(0, 0.0, 0.0, 0.25)], description="d")
    assert len(drawn(svg, "line", "whisker")) == 2
    first = drawn(svg, "line", "whisker")[0]
    assert (float(first.attrib["x1"]), float(first.attrib["x2"])) == (44.0, 164.0)
    assert len(drawn(svg, "circle", "mark")) == 1


@given(low=st.floats(-100, 100), span=st.floats(1e-3, 1e4))
@settings(max_examples=100, deadline=None)
def test_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    ticks = figures.nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    assert min(ticks) >= low - 1e-6 * span
    assert max(ticks) <= low + span + 1e-6 * span
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


@pytest.mark.parametrize("channels", [3, 4])
def test_thumbnail_keeps_every_pixel(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, channels), dtype=np.uint8)
    assert np.array_equal(decode(figures.thumbnail(pixels.astype(np.float32) / 255)), pixels)


def test_large_thumbnails_are_reduced() -> None:
    assert decode(figures.thumbnail(np.zeros((600, 300, 3), np.float32))).shape[:2] == (figures.MAX_THUMBNAIL, figures.MAX_THUMBNAIL // 2)


def test_few_changed_pixels_are_shown_alone() -> None:
    clean = np.full((8, 8, 3), 0.5, np.float32)
    attacked = clean.copy()
    attacked[2, 3] = (1, 0, 0.5)
    picture, caption = figures.difference(clean, attacked)
    assert caption == "1 pixel"
    assert np.argwhere(picture[..., 3]).tolist() == [[2, 3]]
    assert np.array_equal(picture[2, 3, :3], attacked[2, 3])


def test_spread_change_is_amplified_around_grey() -> None:
    clean = np.full((8, 8, 3), 0.5, np.float32)
    sign = np.where(np.random.default_rng(0).random((8, 8, 3)) < 0.5, -1, 1).astype(np.float32)
    picture, caption = figures.difference(clean, clean + sign * np.float32(4 / 255))
    assert caption == "amplified ×31"
    assert np.allclose(picture, 0.5 + sign * 31 * 4 / 255, atol=1e-4)


def test_no_change_is_transparent() -> None:
    clean = np.full((4, 4, 3), 0.5, np.float32)
    picture, caption = figures.difference(clean, clean)
    assert caption == "no change"
    assert not picture[..., 3].any()


def test_heat_is_absolute_and_nearest() -> None:
    image = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    cold = figures.heat_overlay(image, np.zeros((8, 8), np.float32))
    assert np.allclose(cold[..., 0], cold[..., 2])  # grey
    corner = np.zeros((2, 2), np.float32)
    corner[0, 1] = 0.7
    warm = figures.heat_overlay(image, corner)
    changed = (warm != cold).any(axis=2)
    assert changed[:4, 4:].all()
    assert changed.sum() == 16
    assert warm.min() >= 0
    assert warm.max() <= 1
    other = figures.heat_overlay(image, np.full((8, 8), 0.7, np.float32))
    assert np.array_equal(warm[:4, 4:], other[:4, 4:])  # the colour depends on the value alone, not on the map's largest


def test_heat_survives_nan() -> None:
    assert np.isfinite(figures.heat_overlay(np.zeros((2, 2, 3), np.float32), np.full((2, 2), np.nan, np.float32))).all()
