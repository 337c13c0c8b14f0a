"""Figures of the page as inline SVG, drawn in the page's own colours so that they are right in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from pyro_lift.bench.page.ranks import Ranking

__all__ = ["Svg", "critical_difference_diagram", "curves", "dots", "reliability_diagram"]


class Svg:
    """A drawing in pixels; colours are classes of the page's style sheet."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "axis") -> None:
        """Draw a straight line."""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Draw a line through points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{joined}" class="line {kind}"/>')

    def dot(self, x: float, y: float, radius: float, kind: str, title: str = "") -> None:
        """Draw a filled circle, with words for a pointer that rests on it."""
        words = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="dot {kind}">{words}</circle>')

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> None:
        """Write words; ``anchor`` is start, middle or end."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>')

    def __str__(self) -> str:
        """Return the element; it shrinks with the page and never grows beyond its size."""
        return (
            f'<svg viewBox="0 0 {self.width:.0f} {self.height:.0f}" style="max-width:{self.width:.0f}px" role="img" '
            f'aria-label="{escape(self.label)}">{"".join(self.parts)}</svg>'
        )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers between two, at most so many and one more."""
    span = max(high - low, 1e-12)
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def critical_difference_diagram(ranking: Ranking, titles: Mapping[str, str], ours: Sequence[str]) -> str:
    """Draw mean ranks on a line, the best on the left, with bars over methods that cannot be told apart."""
    k = len(ranking.methods)
    rows = (k + 1) // 2
    width, left, right, top = 760.0, 190.0, 570.0, 58.0
    bars = ranking.groups()
    height = top + 14 + 9 * len(bars) + 19 * rows + 8
    drawing = Svg(width, height, "mean ranks of the methods, best on the left, with bars over those that are alike")

    def at(rank: float) -> float:
        return left + (rank - 1.0) / max(k - 1, 1) * (right - left)

    drawing.line(left, top, right, top)
    for mark in range(1, k + 1, max(1, round(k / 10))):
        drawing.line(at(mark), top - 5, at(mark), top)
        drawing.text(at(mark), top - 9, str(mark), "middle", "small")
    if ranking.difference is not None:
        end = min(at(1.0 + ranking.difference), right)
        drawing.line(left, 22, end, 22, "strong")
        drawing.text(left, 15, f"critical difference {ranking.difference:.2f}", "start", "small")
    for number, (first, last) in enumerate(bars):
        y = top + 10 + 9 * number
        drawing.line(at(ranking.mean_ranks[first]) - 4, y, at(ranking.mean_ranks[last]) + 4, y, "strong")
    below = top + 20 + 9 * len(bars)
    for place, (name, rank) in enumerate(zip(ranking.methods, ranking.mean_ranks, strict=True)):
        on_left = place < rows
        y = below + 19 * (place if on_left else k - 1 - place)
        end = left - 12 if on_left else right + 12
        drawing.line(at(rank), top, at(rank), y, "thin")
        drawing.line(at(rank), y, end, y, "thin")
        words = f"{titles[name]}  {rank:.2f}" if on_left else f"{rank:.2f}  {titles[name]}"
        drawing.text(end - 4 if on_left else end + 4, y + 4, words, "end" if on_left else "start", _kind(name, ours))
    return str(drawing)


def _kind(name: str, ours: Sequence[str]) -> str:
    return "ours" if name in ours else ""


def reliability_diagram(bins: Sequence[Mapping[str, Sequence[float]]], title: str, note: str, ours: bool) -> str:
    """Draw the share of right answers against confidence, over the bins of all tasks and seeds of a method."""
    size, left, top = 140.0, 28.0, 22.0
    drawing = Svg(size + left + 8, size + top + 34, f"reliability of {title}")
    drawing.text(left + size / 2, 13, title, "middle", "ours" if ours else "")
    drawing.line(left, top + size, left + size, top + size)
    drawing.line(left, top, left, top + size)
    drawing.line(left, top + size, left + size, top, "dashed")
    for value in (0.0, 0.5, 1.0):
        drawing.text(left + value * size, top + size + 13, f"{value:g}", "middle", "small")
        drawing.text(left - 4, top + size - value * size + 4, f"{value:g}", "end", "small")
    count = max((len(found["cases"]) for found in bins), default=0)
    cases = [sum(found["cases"][k] for found in bins) for k in range(count)]
    total = max(sum(cases), 1)
    points = []
    for k, n in enumerate(cases):
        if n:
            confidence, right = (
                sum(found["cases"][k] * found[name][k] for found in bins) / n for name in ("confidence", "right")
            )
            points.append((left + confidence * size, top + size - right * size, n))
    kind = "c0" if ours else "c7"
    drawing.path([(x, y) for x, y, _ in points], kind)
    for x, y, n in points:
        drawing.dot(x, y, 1.5 + 7.0 * math.sqrt(n / total), kind, f"{n} rows")
    drawing.text(left + size / 2, top + size + 28, note, "middle", "small")
    return str(drawing)


def dots(
    rows: Sequence[tuple[str, float, float | None, bool]], label: str, marks: Mapping[str, float] | None = None
) -> str:
    """Draw a dot a method, with a bar around it where there is one.

    Args:
        rows: title, value, half the length of its bar, and whether the method is ours; from the top down.
        label: of the axis.
        marks: values that stand as vertical lines, by name.
    """
    left, right, top, step = 265.0, 735.0, 22.0, 19.0
    bottom = top + step * len(rows)
    drawing = Svg(760.0, bottom + 40, label)
    ends = [value + side * (half or 0.0) for _, value, half, _ in rows for side in (-1, 1)]
    ends += list((marks or {}).values())
    low, high = min(ends), max(ends)
    pad = 0.05 * (high - low or abs(high) or 1.0)
    low, high = low - pad, high + pad

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for value in ticks(low, high, 6):
        drawing.line(at(value), top - 6, at(value), bottom - 4, "grid")
        drawing.text(at(value), bottom + 10, f"{value:g}", "middle", "small")
    for name, value in (marks or {}).items():
        drawing.line(at(value), top - 6, at(value), bottom - 4, "dashed")
        drawing.text(at(value), top - 8, name, "middle", "small")
    for place, (title, value, half, ours) in enumerate(rows):
        y = top + step * place + 4
        kind = "c0" if ours else "c7"
        if half is not None:
            drawing.line(at(value - half), y, at(value + half), y, f"bar {kind}")
        drawing.dot(at(value), y, 4.5, kind, f"{value:.3f}" if half is None else f"{value:.3f} ± {half:.3f}")
        drawing.text(left - 10, y + 4, title, "end", "ours" if ours else "")
    drawing.text((left + right) / 2, bottom + 30, label, "middle", "small")
    return str(drawing)


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float | None]]], labels: tuple[str, str], *, logs: bool = False
) -> str:
    """Draw lines of values against something that grows, on logarithmic axes where ``logs``; names on the right."""
    left, right, top, bottom = 60.0, 560.0, 14.0, 250.0
    drawing = Svg(760.0, bottom + 44, " against ".join(reversed(labels)))

    def scaled(value: float) -> float:
        return math.log10(value) if logs else value

    points = {
        name: [(scaled(x), scaled(y)) for x, y in zip(*pair, strict=True) if y is not None and (y > 0 or not logs)]
        for name, pair in lines.items()
    }
    flat = [point for found in points.values() for point in found]
    if not flat:
        return ""
    (x0, x1), (y0, y1) = ((min(side), max(side)) for side in zip(*flat, strict=True))
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    drawing.line(left, bottom, right, bottom)
    drawing.line(left, top, left, bottom)
    for value in ticks(x0, x1):
        x, _ = place(value, y0)
        drawing.text(x, bottom + 14, _shown(value, logs), "middle", "small")
    for value in ticks(y0, y1):
        _, y = place(x0, value)
        drawing.line(left, y, right, y, "grid")
        drawing.text(left - 6, y + 4, _shown(value, logs), "end", "small")
    for number, (name, found) in enumerate(points.items()):
        kind = f"c{number % 8}"
        drawing.path([place(*point) for point in found], kind)
        drawing.line(right + 14, top + 8 + 17 * number, right + 34, top + 8 + 17 * number, f"line {kind}")
        drawing.text(right + 40, top + 12 + 17 * number, name, "start", "small")
    drawing.text((left + right) / 2, bottom + 34, labels[0], "middle", "small")
    drawing.text(left, top - 4, labels[1], "start", "small")
    return str(drawing)


def _shown(value: float, logs: bool) -> str:
    return f"{10.0**value:.2g}" if logs else f"{value:g}"
