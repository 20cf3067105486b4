"""Line charts as inline SVG: no script, no file beside the page, readable at the width of a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26
POINTS = 300


class Series(NamedTuple):
    """Numbers of one curve; None and NaN leave a gap."""

    x: Sequence[float]
    y: Sequence[float | None]


def line_chart(
    title: str,
    series: Mapping[str, Series],
    marks: Sequence[float] = (),
    note: str = "",
    start: float | None = None,
) -> str:
    """A figure of curves by name over a common x from `start` on; `marks` are upright dashed lines.

    Empty where there is nothing finite to draw. The y axis is logarithmic where all values are positive and
    span more than a factor of 30.
    """
    drawn = {name: thinned(curve) for name, curve in series.items()}
    values = [y for curve in drawn.values() for y in curve.y if _finite(y)]
    if not values:
        return ""
    logarithmic = min(values) > 0 and max(values) > 30 * min(values)
    xs = [x for curve in drawn.values() for x in curve.x] + ([] if start is None else [start])
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, False)
    y_axis = _Axis(min(values), max(values), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [*_grid(x_axis, y_axis)]
    for mark in marks:
        at = x_axis(mark)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for i, curve in enumerate(drawn.values()):
        parts.append(f'<path class="curve c{i % 6}" d="{_path(curve, x_axis, y_axis)}"/>')
    legend = "".join(
        f'<span><i class="c{i % 6}"></i>{escape(name)} <b>{_last(curve)}</b></span>'
        for i, (name, curve) in enumerate(series.items())
    )
    note = f"<p>{escape(note)}</p>" if note else ""
    title = escape(title)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f'<figure><h3>{title}</h3>{svg}<div class="legend">{legend}</div>{note}</figure>'


def thinned(curve: Series, points: int = POINTS) -> Series:
    """At most `points` of a curve: means over stretches of equal length, the last point kept."""
    if len(curve.x) <= points:
        return curve
    xs, ys, last = [], [], len(curve.x) - 1
    size = math.ceil(last / (points - 1))
    for start in range(0, last, size):
        stop = min(start + size, last)
        part = [y for y in curve.y[start:stop] if _finite(y)]
        stretch = curve.x[start:stop]
        xs.append(sum(stretch) / len(stretch))
        ys.append(sum(part) / len(part) if part else None)
    return Series([*xs, curve.x[-1]], [*ys, curve.y[-1]])


def number(value: float | None) -> str:
    """1234567 -> '1.23M', 0.000123 -> '1.23e-4': three digits."""
    if not _finite(value):
        return "none"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


class _Axis:
    """Maps values to pixels and knows round places for its ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool):
        self.logarithmic, self.start, self.end = logarithmic, start, end
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
        if high <= low:
            pad = abs(low) * 0.1 or 0.5
            low, high = low - pad, high + pad
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.logarithmic else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.floor(self.low), math.ceil(self.high)
            step = max(1, (last - first) // 4)
            tens = [10.0**k for k in range(first, last + 1, step)]
            fine = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
            inside = [[t for t in ticks if self.low <= math.log10(t) <= self.high] for ticks in (tens, fine)]
            return inside[0] if len(inside[0]) > 2 else inside[1]
        rough = (self.high - self.low) / 4
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks():
        parts.append(
            f'<text x="{x_axis(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>'
        )
    return parts


def _path(curve: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    commands, pen = [], "M"
    for x, y in zip(curve.x, curve.y, strict=True):
        if not _finite(y):
            pen = "M"
            continue
        commands.append(f"{pen}{x_axis(x):.1f} {y_axis(y):.1f}")
        pen = "L"
    return "".join(commands) + ("h.01" if len(commands) == 1 else "")  # a dot where there is one point


def _last(curve: Series) -> str:
    return number(next((y for y in reversed(curve.y) if _finite(y)), None))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
