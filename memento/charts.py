"""Line charts and the KV sawtooth as inline SVG: no script, no external resource, light and dark.

Every chart is drawn twice, for a wide and for a narrow screen, because scaled text is unreadable on one of them; a
media query in `CSS` shows the right one. Colours are CSS variables, so the page decides about light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDE, NARROW = 560, 340
"""Widths of the two drawings of a chart in CSS pixels."""
FULL_WIDE = 1140
"""Width of the wide drawing of a chart that takes a whole row."""

CSS = """
.chart svg{display:block;width:100%;height:auto;overflow:visible}
.chart .narrow{display:none}
.chart text{fill:var(--muted);font-size:12px;font-family:inherit}
.chart .title{fill:var(--ink);font-weight:600}
.chart .grid{stroke:var(--rule);stroke-width:1;shape-rendering:crispEdges}
.chart .axis{stroke:var(--muted);stroke-width:1;shape-rendering:crispEdges}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke-width:1.5;stroke-dasharray:4 4}
.chart .dot{stroke:var(--paper);stroke-width:1.5}
.c0{stroke:var(--c0)} .c1{stroke:var(--c1)} .c2{stroke:var(--c2)} .c3{stroke:var(--muted)}
.chart .f0{fill:var(--c0)} .chart .f1{fill:var(--c1)} .chart .f2{fill:var(--c2)} .chart .f3{fill:var(--muted)}
.chart .area{fill:var(--c0);opacity:.14;stroke:none}
.chart .drop{stroke:var(--c1);stroke-width:1;stroke-dasharray:2 2}
.chart .note{fill:var(--c1);font-size:11px}
.chart .cursor{stroke:var(--ink);stroke-width:1}
@media (max-width:640px){.chart .wide{display:none}.chart .narrow{display:block}}
"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name and its points, None where there is no value.

    Attributes:
        colour: 0-3, an index into the page's palette.
        line, dots: how it is drawn.
        faint: thin and dashed, for a reference.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    line: bool = True
    dots: bool = False
    faint: bool = False

    def positive(self) -> Series:
        """The same line without the values that a logarithmic axis cannot show."""
        return replace(self, y=[y if y is not None and y > 0 else None for y in self.y])

    def points(self) -> list[tuple[float, float]]:
        """The points that have a finite value."""
        pairs = zip(self.x, self.y, strict=True)
        return [(float(x), float(y)) for x, y in pairs if y is not None and math.isfinite(y)]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that cover ``[low, high]``, roughly `about` of them."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(about, 1)
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short label for an axis: ``0``, ``0.25``, ``1,200``, ``1e-06``."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.0e}" if math.isclose(value, float(f"{value:.0e}")) else f"{value:.1e}"
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def both_widths(draw: Callable[[int], str], wide: int = WIDE) -> str:
    """The two drawings of a chart in one element."""
    return f'<div class="chart"><div class="wide">{draw(wide)}</div><div class="narrow">{draw(NARROW)}</div></div>'


def line_chart(
    series: Iterable[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    wide: int = WIDE,
    log: bool = False,
) -> str:
    """A line chart with axes, grid, units and a legend; empty text if no series has a point.

    Args:
        y_range: fixed ends of the y axis, None to follow the data.
        wide: width of the wide drawing in CSS pixels.
        log: a logarithmic y axis; values that are not positive are left out.
    """
    drawn = [s for s in (s.positive() if log else s for s in series) if s.points()]
    if not drawn:
        return ""
    named = [(s.name, s.colour, s.faint) for s in drawn]
    drawing = both_widths(lambda width: _line_chart(drawn, x_label, y_label, y_range, width, log), wide)
    return drawing + (legend(named) if len(named) > 1 else "")


def _line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    y_range: tuple[float | None, float | None],
    width: int,
    log: bool,
) -> str:
    scale = Log10() if log else Linear()
    points = [p for s in series for p in s.points()]
    y_low = y_range[0] if y_range[0] is not None else min(y for _, y in points)
    y_high = y_range[1] if y_range[1] is not None else max(y for _, y in points)
    frame = Frame.around([x for x, _ in points], y_low, y_high, width=width, height=250, scale=scale)
    body = [frame.axes(x_label, y_label)]
    for s in series:
        path = " ".join(f"{'L' if i else 'M'}{frame.x(x):.1f},{frame.y(y):.1f}" for i, (x, y) in enumerate(s.points()))
        if s.line and len(s.points()) > 1:
            body.append(f'<path class="line c{s.colour}{" faint" if s.faint else ""}" d="{path}"/>')
        shown = s.dots or len(s.points()) == 1
        for x, y in s.points():
            # Without dots, an invisible target for the tooltip.
            style = f'class="dot f{s.colour}" r="4"' if shown else 'fill="transparent" r="7"'
            body.append(
                f'<circle {style} cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}">'
                f"<title>{escape(s.name)}: {y:.4g} at {escape(x_label)} {number(x)}</title></circle>"
            )
    return frame.svg("".join(body), f"{y_label} over {x_label}")


def legend(named: Sequence[tuple[str, int, bool]]) -> str:
    """The legend under a chart, in HTML so that it wraps."""
    items = (
        f'<span><svg width="22" height="10" aria-hidden="true"><path class="line c{colour}{" faint" if faint else ""}" '
        f'd="M1,5H21"/></svg>{escape(name)}</span>'
        for name, colour, faint in named
    )
    return f'<div class="legend">{"".join(items)}</div>'


class Linear:
    """A linear y axis."""

    def place(self, value: float) -> float:
        """Where a value goes, in units that grow evenly on the page."""
        return value

    def ticks(self, low: float, high: float) -> list[float]:
        """Round values that cover the range."""
        return ticks(low, high, 5)


class Log10(Linear):
    """A logarithmic y axis."""

    def place(self, value: float) -> float:
        return math.log10(value)

    def ticks(self, low: float, high: float) -> list[float]:
        """Powers of ten that cover the range, at most seven."""
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        stride = max(1, math.ceil((last - first) / 6))
        return [10.0**e for e in range(first, max(last, first + 1) + stride, stride)]


@dataclass(frozen=True, slots=True)
class Frame:
    """The plot area of a chart: where values go, and its axes."""

    width: int
    height: int
    left: float
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    x_low: float
    x_high: float
    scale: Linear
    top: float = 26
    bottom: float = 40
    right: float = 14

    @classmethod
    def around(
        cls,
        xs: Sequence[float],
        y_low: float,
        y_high: float,
        *,
        width: int,
        height: int,
        scale: Linear | None = None,
    ) -> Frame:
        """A frame with round ticks around the data."""
        scale = scale or Linear()
        y_ticks = scale.ticks(y_low, y_high)
        x_low, x_high = min(xs), max(xs)
        if x_high == x_low:
            x_high = x_low + 1
        x_ticks = [t for t in ticks(x_low, x_high, max(4, width // 90)) if x_low - 1e-9 <= t <= x_high + 1e-9]
        whole = all(float(x).is_integer() for x in xs)
        left = 14 + 7 * max(len(number(t)) for t in y_ticks)
        return cls(
            width,
            height,
            left,
            tuple(t for t in x_ticks if not whole or float(t).is_integer()),
            tuple(y_ticks),
            x_low,
            x_high,
            scale,
        )

    def x(self, value: float) -> float:
        """Horizontal pixel of a value."""
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Vertical pixel of a value."""
        low, high, value = (self.scale.place(v) for v in (self.y_ticks[0], self.y_ticks[-1], value))
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.bottom - self.top)

    def axes(self, x_label: str, y_label: str) -> str:
        """Grid, tick labels and the two axis labels (the y label is horizontal, above its axis)."""
        right, floor = self.width - self.right, self.height - self.bottom
        parts = [f'<text class="title" x="0" y="12">{escape(y_label)}</text>']
        for t in self.y_ticks:
            parts.append(f'<path class="grid" d="M{self.left:.1f},{self.y(t):.1f}H{right}"/>')
            parts.append(f'<text x="{self.left - 6:.1f}" y="{self.y(t) + 4:.1f}" text-anchor="end">{number(t)}</text>')
        for t in self.x_ticks:
            parts.append(f'<path class="axis" d="M{self.x(t):.1f},{floor}v4"/>')
            parts.append(f'<text x="{self.x(t):.1f}" y="{floor + 17}" text-anchor="middle">{number(t)}</text>')
        parts.append(f'<path class="axis" d="M{self.left:.1f},{floor}H{right}"/>')
        parts.append(f'<text x="{right}" y="{self.height - 6}" text-anchor="end">{escape(x_label)}</text>')
        return "".join(parts)

    def svg(self, body: str, description: str, attributes: str = "") -> str:
        """The whole drawing."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(description)}"{attributes}>'
            f"{body}</svg>"
        )


def sawtooth(
    resident_T: NDArray[np.int64],
    evictions: Sequence[tuple[int, int, int]],
    prompt_len: int,
    *,
    cursor: bool = False,
) -> str:
    """Resident KV tokens over one trace: as sampled, and without eviction; every eviction annotated.

    Args:
        resident_T: [T] resident tokens when position t is computed (`memento.format.kv_profile`).
        evictions: ``(boundary, start, end)``, the evictions carried out.
        prompt_len: P; the end of the prompt is marked.
        cursor: add a vertical line with class ``cursor`` that a script can move. Each svg then carries ``data-x0``
            and ``data-x1``, the pixels of the first and the last position.
    """
    peak, total = int(resident_T.max()), len(resident_T)
    key = [(f"with eviction (peak {peak:,})", 0, False), (f"same tokens without eviction (peak {total:,})", 3, True)]
    drawing = both_widths(lambda width: _sawtooth(resident_T, evictions, prompt_len, width, cursor), FULL_WIDE)
    return drawing + legend(key)


def _sawtooth(
    resident_T: NDArray[np.int64], evictions: Sequence[tuple[int, int, int]], prompt_len: int, width: int, cursor: bool
) -> str:
    total = len(resident_T)
    # A point per pixel is enough: between evictions the curve is a straight line.
    corners = {0, total - 1, prompt_len} | {b + d for b, _, _ in evictions for d in (-1, 0)}
    xs = sorted(x for x in corners if 0 <= x < total)
    frame = Frame.around([0, max(total - 1, 1)], 0, total, width=width, height=300 if width > NARROW else 260)
    floor = frame.height - frame.bottom
    curve = "L".join(f"{frame.x(x):.1f},{frame.y(int(resident_T[x])):.1f}" for x in xs)
    body = [
        frame.axes("position in the trace (tokens)", "resident KV (tokens)"),
        f'<path class="area" d="M{frame.x(0):.1f},{floor}L{curve}L{frame.x(total - 1):.1f},{floor}Z"/>',
        f'<path class="line faint c3" d="M{frame.x(0):.1f},{frame.y(1):.1f}'
        f'L{frame.x(total - 1):.1f},{frame.y(total):.1f}"/>',
        f'<path class="line c0" d="M{curve}"/>',
    ]
    if prompt_len:
        px = frame.x(prompt_len)
        body.append(f'<path class="grid" d="M{px:.1f},{frame.top}V{floor}"/>')
        if px - frame.left > 40:  # else it would sit on the first teeth
            body.append(f'<text x="{px + 4:.1f}" y="{floor - 6}">prompt ends</text>')
    last_label = -math.inf
    for boundary, start, end in evictions:
        if boundary >= total:
            continue
        x, high, low = frame.x(boundary), frame.y(int(resident_T[boundary - 1])), frame.y(int(resident_T[boundary]))
        body.append(
            f"<g><title>before position {boundary}: tokens {start} to {end - 1} leave ({end - start} tokens)</title>"
            f'<path class="drop" d="M{x:.1f},{high - 6:.1f}V{low:.1f}"/>'
            f'<circle class="dot f1" cx="{x:.1f}" cy="{low:.1f}" r="3.5"/></g>'
        )
        label = f"−{end - start}"
        if x - last_label > 8 + 7 * len(label):
            anchor = "middle" if x < width - frame.right - 16 else "end"
            body.append(f'<text class="note" x="{x:.1f}" y="{high - 10:.1f}" text-anchor="{anchor}">{label}</text>')
            last_label = x
    attributes = ""
    if cursor:
        body.append(f'<path class="cursor" d="M0,{frame.top}V{floor}" transform="translate({frame.x(0):.1f} 0)"/>')
        attributes = f' data-x0="{frame.x(0):.2f}" data-x1="{frame.x(total - 1):.2f}"'
    described = f"KV sawtooth: peak {int(resident_T.max())} resident tokens of {total}, {len(evictions)} evictions"
    return frame.svg("".join(body), described, attributes)
