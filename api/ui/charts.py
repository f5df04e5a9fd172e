"""Charts as SVG made on the server: no script, no inline style, colours by class so that they follow the theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

WIDTH, HEIGHT = 720, 180
LEFT, RIGHT, TOP, BOTTOM = 56, 8, 8, 24
SPARK_HEIGHT = 24
SPARK_STEP = 2


@dataclass(frozen=True, slots=True)
class Series:
    """One line or row of bars. `name`: its words and, in lower case with dashes, its class. None: nobody looked."""

    name: str
    values: Sequence[float | None]

    @property
    def css(self) -> str:
        """Its class in the style sheet."""
        return "series-" + self.name.lower().replace(" ", "-")


def sparkline(completed: Sequence[int] | None, failed: Sequence[int] | None) -> Markup:
    """Return what ended minute by minute as small bars, failed ones on top. None: nothing ended."""
    done, bad = list(completed or ()), list(failed or ())
    text = f"{sum(done):,} completed, {sum(bad):,} failed in the last hour"
    most = max((a + b for a, b in zip(done, bad, strict=True)), default=0)
    if not most:
        return Markup('<span class="quiet">nothing ended</span>')
    parts = []
    for i, (good, wrong) in enumerate(zip(done, bad, strict=True)):
        foot = float(SPARK_HEIGHT)
        for count, css in ((good, "bar-completed"), (wrong, "bar-failed")):
            # what happened at all is seen, however small beside the rest
            tall = max(1.0, count / most * SPARK_HEIGHT) if count else 0.0
            if tall:
                foot -= min(tall, foot)
                parts.append(
                    f'<rect class="{css}" x="{i * SPARK_STEP}" y="{foot:.1f}" width="1.6" height="{tall:.1f}"/>'
                )
    return Markup(
        '<svg class="spark" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{text}">{bars}</svg>'
    ).format(w=60 * SPARK_STEP, h=SPARK_HEIGHT, text=text, bars=Markup("".join(parts)))  # noqa: S704 numbers only


def bars(title: str, times: Sequence[datetime], series: Sequence[Series], unit: str = "") -> Markup:
    """Return stacked bars, one per time, the first series at the foot."""
    sums = [sum(one.values[i] or 0 for one in series) for i in range(len(times))]
    top = nice_top(max(sums, default=0))
    wide = (WIDTH - LEFT - RIGHT) / max(1, len(times))
    parts = []
    for i in range(len(times)):
        foot = 0.0
        for one in series:
            value = one.values[i] or 0
            if value:
                y, upper = _y(foot, top), _y(foot + value, top)
                parts.append(
                    f'<rect class="{one.css}" x="{LEFT + i * wide:.1f}" y="{upper:.1f}" '
                    f'width="{max(0.5, wide * 0.85):.1f}" height="{y - upper:.1f}"/>'
                )
                foot += value
    return _frame(title, times, series, top, unit, parts)


def lines(title: str, times: Sequence[datetime], series: Sequence[Series], unit: str = "") -> Markup:
    """Return a line per series; a time without a value is a gap."""
    top = nice_top(max((value for one in series for value in one.values if value is not None), default=0))
    step = (WIDTH - LEFT - RIGHT) / max(1, len(times) - 1)
    parts = []
    for one in series:
        path, pen = [], "M"
        for i, value in enumerate(one.values):
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{LEFT + i * step:.1f} {_y(value, top):.1f}")
            # a lone value would be invisible
            alone = i + 1 == len(one.values) or one.values[i + 1] is None
            if pen == "M" and alone:
                path.append("h2")
            pen = "L"
        if path:
            parts.append(f'<path class="line {one.css}" d="{" ".join(path)}"/>')
    return _frame(title, times, series, top, unit, parts)


def nice_top(most: float) -> float:
    """Return the end of an axis: the next of 1, 2, 3, 4, 5, 6, 8, 10 times a power of ten; 1 if there is nothing."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(power * step for step in (1, 2, 3, 4, 5, 6, 8, 10) if power * step >= most * 0.9999)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - min(value, top) / top * (HEIGHT - TOP - BOTTOM)


def _frame(
    title: str, times: Sequence[datetime], series: Sequence[Series], top: float, unit: str, parts: Sequence[str]
) -> Markup:
    """The drawing with its axes, below it which colour is what."""
    grid = []
    for share in (0, 0.5, 1):
        y = _y(top * share, top)
        grid.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        grid.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * share:,.5g}{unit}</text>'
        )
    grid += _times(times)
    drawn = Markup("".join([*grid, *parts]))  # noqa: S704 numbers, and names that are constants
    keys = Markup("").join(
        Markup('<li><span class="swatch {}" aria-hidden="true"></span> {}</li>').format(one.css, one.name)
        for one in series
    )
    return Markup(
        '<figure class="chart"><figcaption>{title}</figcaption>'
        '<svg viewBox="0 0 {w} {h}" role="img" aria-label="{title}; the table below has the numbers">{drawn}</svg>'
        '<ul class="legend">{keys}</ul></figure>'
    ).format(title=title, w=WIDTH, h=HEIGHT, drawn=drawn, keys=keys)


def _times(times: Sequence[datetime]) -> list[str]:
    if not times:
        return []
    long = (times[-1] - times[0]).total_seconds() > 2 * 86400
    marks = []
    for share, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end")):
        at = times[round(share * (len(times) - 1))]
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        text = f"{at:%d %b}" if long else f"{at:%H:%M}"
        marks.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
    return marks
