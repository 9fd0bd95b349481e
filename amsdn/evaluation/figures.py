"""The report's drawings: small inline SVG charts and pixel-exact thumbnails.

Charts are written by hand rather than by a plotting library for three reasons: the colours are CSS classes, so that one
drawing serves the light and the dark page; text stays text; and the same numbers always give the same bytes.
Every chart is drawn on a 360-unit canvas, which is a phone's width, and is tiled, not enlarged, on a desk.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 34, 348, 28, 206  # the plot's frame, in canvas units
SLOTS = 6  # line colours and markers defined by the page's style sheet; further runs reuse them
DASHES = ("", "6 3", "2 2.5", "9 3 2 3")
MIN_TICK_GAP = 24  # canvas units between two tick labels of the x axis
MAX_THUMBNAIL = 256  # larger images are reduced before they are embedded
_HEAT = np.array([[0.15, 0.08, 0.32], [0.55, 0.13, 0.42], [0.88, 0.35, 0.20], [0.99, 0.75, 0.22], [1.0, 1.0, 0.80]])

FloatImage = NDArray[np.float32]  # [H,W,3] or [H,W], values in [0,1]


@dataclass(frozen=True)
class Point:
    """One measured share (in [0,1]) at a position of the x axis, with its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A line of a chart. ``slot`` picks colour and marker (one per run), ``dash`` the stroke (one per attack)."""

    label: str
    points: tuple[Point, ...]
    slot: int = 0
    dash: int = 0
    markers: bool = True


@dataclass(frozen=True)
class Axis:
    """The x axis: its title, its extent, and labelled positions."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]


def line_chart(
    curves: Sequence[Curve], axis: Axis, *, description: str, y_title: str, diagonal: bool = False, guide: float | None = None
) -> Markup:
    """Shares in per cent against ``axis``, as one inline SVG.

    Args:
        curves: the lines; a band is drawn wherever two neighbouring points both have intervals.
        description: what a reader who cannot see the chart is told.
        diagonal: draw the line from corner to corner: a detector that guesses, or confidences that are met.
        guide: an x position to mark with a thin vertical line.
    """
    span = (axis.high - axis.low) or 1.0

    def at(x: float) -> float:
        return LEFT + (x - axis.low) / span * (RIGHT - LEFT)

    parts = [*_grid(y_title), *_ticks(axis, at)]
    if diagonal:
        parts.append(f'<line class="guide" x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{TOP}"/>')
    if guide is not None:
        parts.append(f'<line class="guide" x1="{_n(at(guide))}" y1="{BOTTOM}" x2="{_n(at(guide))}" y2="{TOP}"/>')
    placed = [[(at(p.x), p) for p in sorted(c.points, key=lambda p: p.x)] for c in curves]
    parts += [_band(points, c.slot) for c, points in zip(curves, placed, strict=True)]
    # The first curve is the subject of the report: drawn last, so that it lies on top.
    for curve, points in reversed(list(zip(curves, placed, strict=True))):
        parts.append(_line(curve, [(x, _y(p.y)) for x, p in points]))
        if curve.markers:
            parts += [_marker(x, _y(p.y), curve.slot) for x, p in points]
    return _svg("chart", WIDTH, HEIGHT, description, parts)


def interval_strip(rows: Sequence[Point | None], *, description: str) -> Markup:
    """One dot with whiskers per run on a common 0 to 100 % scale, for a table cell; None leaves a run's line empty."""
    width, step = 168, 13
    height = step * len(rows) + 3
    parts = [f'<line class="grid" x1="{_n(4 + 1.6 * v)}" x2="{_n(4 + 1.6 * v)}" y1="0" y2="{height}"/>' for v in (0, 25, 50, 75, 100)]
    for slot, point in enumerate(rows):
        if point is None:
            continue
        y = 8 + step * slot
        if point.low is not None and point.high is not None:
            x1, x2 = _n(4 + 160 * point.low), _n(4 + 160 * point.high)
            parts.append(f'<line class="whisker s{slot % SLOTS}" x1="{x1}" x2="{x2}" y1="{y}" y2="{y}"/>')
        parts.append(_marker(4 + 160 * point.y, y, slot))
    return _svg("strip", width, height, description, parts)


def swatch(slot: int, dash: int = 0, marker: bool = True) -> Markup:
    """The line and marker of a legend entry; decoration, since the entry's text stands beside it."""
    line = f'<line class="line s{slot % SLOTS}" x1="1" x2="27" y1="6" y2="6"{_dash(dash)}/>'
    return Markup(f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">{line}{_marker(14, 6, slot) if marker else ""}</svg>')


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that cover [low, high]."""
    raw = (high - low) / 5 or 1.0
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    return [float(np.round(i * step, 10)) for i in range(first, last + 1)]


def thumbnail(image: NDArray[np.float32]) -> str:
    """[H,W,3|4] in [0,1] -> a PNG data address, every pixel exact up to MAX_THUMBNAIL a side."""
    pixels = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_THUMBNAIL, MAX_THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def difference(clean: FloatImage, attacked: FloatImage) -> tuple[NDArray[np.float32], str]:
    """What an attack changed, [H,W,3] twice -> ([H,W,3|4] in [0,1], a caption).

    A change confined to few pixels is shown as those pixels alone, the rest transparent. A change spread over the image is
    shown around mid-grey, amplified to fill the range.
    """
    delta = attacked - clean
    changed = (delta != 0).any(axis=2)
    if not changed.any():
        return np.dstack([np.zeros_like(clean), np.zeros(changed.shape, np.float32)]), "no change"
    if changed.mean() < 0.5:
        return np.dstack([attacked, changed.astype(np.float32)]), f"{changed.sum()} pixel{'' if changed.sum() == 1 else 's'}"
    gain = max(1.0, float(np.floor(0.5 / np.abs(delta).max())))
    return (0.5 + delta * gain).astype(np.float32), f"amplified ×{gain:.0f}"


def heat_overlay(image: FloatImage, heat: FloatImage) -> NDArray[np.float32]:
    """An anomaly map [h,w] in [0,1] over the greyed image [H,W,3]; opacity and colour grow with the map's own value."""
    value = np.clip(np.nan_to_num(_resize(heat, image.shape[0], image.shape[1])), 0, 1)
    grey = (0.25 + 0.5 * image @ np.array([0.299, 0.587, 0.114]))[..., None]
    colour = np.stack([np.interp(value, np.linspace(0, 1, len(_HEAT)), channel) for channel in _HEAT.T], axis=2)
    opacity = (0.92 * np.sqrt(value))[..., None]
    return (grey * (1 - opacity) + colour * opacity).astype(np.float32)


def _resize(heat: FloatImage, height: int, width: int) -> FloatImage:
    """Nearest neighbour, so that a coarse map looks as coarse as it is."""
    rows = np.arange(height) * heat.shape[0] // height
    columns = np.arange(width) * heat.shape[1] // width
    return heat[rows][:, columns]


def _svg(name: str, width: int, height: int, description: str, parts: Sequence[str]) -> Markup:
    label = escape(description)
    return Markup(f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def _grid(y_title: str) -> list[str]:
    lines = [f'<text class="axis-title" x="2" y="12">{escape(y_title)}</text>']  # horizontal, above the axis: easier to read than turned
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _n(_y(share))
        lines.append(f'<line class="{"base" if share == 0 else "grid"}" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 7}" y="{_n(_y(share) + 4)}" text-anchor="end">{round(100 * share)}</text>')
    return lines


def _ticks(axis: Axis, at: Callable[[float], float]) -> list[str]:
    parts = [f'<text class="axis-title" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis.title)}</text>']
    taken = -np.inf
    for value, label in axis.ticks:
        x = at(value)
        parts.append(f'<line class="base" x1="{_n(x)}" x2="{_n(x)}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        if x - taken >= MIN_TICK_GAP:
            parts.append(f'<text class="tick" x="{_n(x)}" y="{BOTTOM + 17}" text-anchor="middle">{escape(label)}</text>')
            taken = x
    return parts


def _band(points: Sequence[tuple[float, Point]], slot: int) -> str:
    known = [(x, p.low, p.high) for x, p in points if p.low is not None and p.high is not None]
    if len(known) < 2:
        return ""
    upper = [f"{_n(x)},{_n(_y(high))}" for x, _, high in known]
    lower = [f"{_n(x)},{_n(_y(low))}" for x, low, _ in reversed(known)]
    return f'<polygon class="band s{slot % SLOTS}" points="{" ".join(upper + lower)}"/>'


def _line(curve: Curve, points: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    return f'<polyline class="line s{curve.slot % SLOTS}" points="{path}"{_dash(curve.dash)}/>'


def _marker(x: float, y: float, slot: int) -> str:
    shape = slot % 4
    style = f'class="mark s{slot % SLOTS}"'
    if shape == 0:
        return f'<circle {style} cx="{_n(x)}" cy="{_n(y)}" r="3.6"/>'
    if shape == 1:
        return f'<rect {style} x="{_n(x - 3.2)}" y="{_n(y - 3.2)}" width="6.4" height="6.4"/>'
    corners = ((0, -4.4), (4.2, 3.4), (-4.2, 3.4)) if shape == 2 else ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0))
    return f'<polygon {style} points="{" ".join(f"{_n(x + dx)},{_n(y + dy)}" for dx, dy in corners)}"/>'


def _dash(dash: int) -> str:
    pattern = DASHES[dash % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _y(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP)


def _n(value: float) -> str:
    """A coordinate with one decimal at most, the same text on every machine."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text
