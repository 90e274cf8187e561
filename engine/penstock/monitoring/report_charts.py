"""SVG charts as text: bars of a feature's bins, and lines over time. The page's CSS gives the colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from penstock.monitoring.report_data import share, time

_BAR_WIDTH, _BAR_HEIGHT = 360, 110
_LINE_WIDTH, _LINE_HEIGHT = 560, 150
_MARGIN = 6


def bars(labels: Sequence[str], reference: Sequence[int], current: Sequence[int], name: str) -> str:
    """Shares of the bins [k] side by side, reference then current; each bin has its figures as a tooltip."""
    n, m = sum(reference) or 1, sum(current) or 1
    p, q = [c / n for c in reference], [c / m for c in current]
    top = max([*p, *q, 1e-9])
    slot = _BAR_WIDTH / max(1, len(labels))
    wide = slot * 0.38
    room = _BAR_HEIGHT - _MARGIN
    series = []
    for css, shares, shift in (("ref", p, 0.1), ("cur", q, 0.52)):
        path = "".join(
            f"M{slot * (k + shift):.1f} {_BAR_HEIGHT}v{-room * value / top:.1f}h{wide:.1f}V{_BAR_HEIGHT}z"
            for k, value in enumerate(shares)
            if value > 0.0
        )
        series.append(f'<path class="{css}" d="{path}"/>')
    tips = "".join(
        f'<rect class="tip" x="{slot * k:.1f}" width="{slot:.1f}" height="{_BAR_HEIGHT}">'
        f"<title>{escape(f'{label}: reference {share(a)}, current {share(b)}')}</title></rect>"
        for k, (label, a, b) in enumerate(zip(labels, p, q))
    )
    return (
        f'<svg viewBox="0 0 {_BAR_WIDTH} {_BAR_HEIGHT + 1}" role="img" '
        f'aria-label="{escape(name)}: reference and current shares by bin">'
        f'{"".join(series)}<path class="axis" d="M0 {_BAR_HEIGHT + 0.5}H{_BAR_WIDTH}"/>{tips}</svg>'
    )


def lines(
    times: Sequence[int],
    series: Sequence[tuple[str, Sequence[float | None]]],
    name: str,
    *,
    bounds: tuple[float, float] | None = None,
    limit: float | None = None,
    unit: str = "",
) -> str:
    """Lines over `times` (microseconds UTC [k], ascending), at most two series; None leaves a gap.

    `bounds` are the least range of the vertical axis, `limit` a dashed horizontal line,
    drawn where the values come near it.
    """
    values = [v for _, points in series for v in points if v is not None and math.isfinite(v)]
    low = min([*values, *(bounds or ())], default=0.0)
    high = max([*values, *(bounds or ())], default=1.0)
    if limit is not None and not low <= limit <= 3.0 * high:
        limit = None  # far above: its line would flatten the others
    high = high if limit is None else max(high, limit)
    if high <= low:
        high = low + 1.0
    span = max(1, times[-1] - times[0]) if times else 1
    left, right = 52, _LINE_WIDTH - _MARGIN
    floor, ceiling = _LINE_HEIGHT - 22, _MARGIN + 4

    def x(at: int) -> float:
        return left + (right - left) * (at - times[0]) / span

    def y(value: float) -> float:
        return floor - (floor - ceiling) * (value - low) / (high - low)

    parts = []
    for k in range(3):
        value = low + (high - low) * k / 2
        level, text = f"{y(value):.1f}", f"{value:.3g}{escape(unit)}"
        parts.append(
            f'<path class="grid" d="M{left} {level}H{right}"/>'
            f'<text x="{left - 6}" y="{level}" dy="3.5" text-anchor="end">{text}</text>'
        )
    if limit is not None:
        parts.append(
            f'<path class="limit" d="M{left} {y(limit):.1f}H{right}"><title>limit {limit:g}</title></path>'
        )
    for css, (label, points) in zip(("cur", "ref"), series):
        parts.append(_line(css, label, [(x(t), v if v is None else y(v), v) for t, v in zip(times, points)]))
    if times:
        for at, anchor in ((times[0], "start"), (times[-1], "end"))[: len(set(times))]:
            parts.append(
                f'<text x="{x(at):.1f}" y="{_LINE_HEIGHT - 6}" text-anchor="{anchor}">{time(at)[:16]}</text>'
            )
    return (
        f'<svg viewBox="0 0 {_LINE_WIDTH} {_LINE_HEIGHT}" role="img" aria-label="{escape(name)} over time">'
        f"{''.join(parts)}</svg>"
    )


def _line(css: str, label: str, points: Sequence[tuple[float, float | None, float | None]]) -> str:
    """One series: a line with its points as dots."""
    steps = []
    for (_, before, _), (x, y, _) in pairwise([(0.0, None, None), *points]):
        if y is not None:
            steps.append(f"{'M' if before is None else 'L'}{x:.1f} {y:.1f}")
    dots = "".join(
        f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="2">'
        f"<title>{escape(label)} {value:.4g}</title></circle>"
        for x, y, value in points
        if y is not None
    )
    return f'<path class="line {css}" d="{"".join(steps)}"/>{dots}'
