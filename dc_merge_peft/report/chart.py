"""Line charts as inline SVG, of curves over directions: strongest first, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dc_merge_peft.markup import Html, element

_WIDTH, _HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 410, 12, 232
# Of a curve that are drawn, evenly over the axis; a rank of thousands has no more pixels.
_POINTS = 64
# A logarithmic axis ends this far below its largest number: below lies noise.
_DECADES = 4.0


@dataclass(frozen=True)
class Curve:
    """One line: its value at direction 1, 2, and so on."""

    values: Sequence[float]
    style: str  # classes of the style sheet
    dash: str | None = None


@dataclass(frozen=True)
class _Axes:
    """From numbers to places on the page."""

    longest: int
    low: float
    high: float
    logarithmic: bool

    def x(self, direction: int) -> float:
        share = math.log2(direction) / (math.log2(self.longest) or 1.0) if self.longest > 1 else 0.5
        return _LEFT + share * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        if self.logarithmic:
            low, high = math.log10(self.low), math.log10(self.high)
            share = (math.log10(max(value, self.low)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return _BOTTOM - share * (_BOTTOM - _TOP)


def line_chart(curves: Sequence[Curve], *, title: str, percent: bool = False) -> Html:
    """A chart; without ``percent`` its axis of values is logarithmic.

    Args:
        curves: In the order of drawing; all numbers are positive.
        title: What it says, for those who hear the page.
        percent: The values lie between 0 and 100, and the axis says so.
    """
    values = [value for curve in curves for value in curve.values]
    axes = _Axes(
        max(len(curve.values) for curve in curves), *((0.0, 100.0, False) if percent else (*_span(values), True))
    )
    ticks = [0, 25, 50, 75, 100] if percent else list(_log_ticks(axes.low, axes.high))
    drawn = [_line(curve, axes) for curve in curves]
    label = element("text", "direction, strongest first", x=(_LEFT + _RIGHT) // 2, y=_HEIGHT - 6, text_anchor="middle")
    return element(
        "svg",
        [_y_tick(tick, axes, "%" if percent else "") for tick in ticks],
        [_x_tick(tick, axes) for tick in _powers(axes.longest)],
        label,
        drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=title,
    )


def swatch(style: str, dash: str | None = None) -> Html:
    """The line of a legend's entry."""
    line = element("path", d="M1 4H27", class_=f"line {style}", stroke_dasharray=dash)
    return element("svg", line, viewBox="0 0 28 8", aria_hidden="true")


def _line(curve: Curve, axes: _Axes) -> Html:
    points = [(axes.x(place), axes.y(curve.values[place - 1])) for place in _places(len(curve.values))]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    if len(points) == 1:  # a line of one point would not show
        path += f"m-4 0h8M{points[0][0]:.1f} {points[0][1]:.1f}m0 -4v8"
    return element("path", d=path, class_=f"line {curve.style}", stroke_dasharray=curve.dash)


def _places(count: int) -> list[int]:
    """Directions to draw: all of few, else evenly on the logarithmic axis."""
    if count <= _POINTS:
        return list(range(1, count + 1))
    return sorted({round(count ** (step / (_POINTS - 1))) for step in range(_POINTS)})


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Round ends of a logarithmic axis that hold the numbers."""
    high = max(values)
    low = max(min(values), high / 10**_DECADES)
    steps = list(_log_steps(low, high))
    return max(step for step in steps if step <= low), min(step for step in steps if step >= high and step > low)


def _log_steps(low: float, high: float, digits: Sequence[int] = (1, 2, 5)) -> Iterable[float]:
    """Round numbers in ascending order, from below the one to above the other."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    return (digit * 10.0**power for power in powers for digit in digits)


def _log_ticks(low: float, high: float) -> Iterable[float]:
    """Decades, and 2 and 5 between them where there is room."""
    steps = _log_steps(low, high, (1,) if high / low > 200 else (1, 2, 5))
    return (tick for tick in steps if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9))


def _powers(longest: int) -> list[int]:
    """1, 2, 4 and so on; the end of a long axis has every second one."""
    powers = [2**power for power in range(longest.bit_length())]
    return powers if len(powers) <= 9 else powers[::2]


def _y_tick(tick: float, axes: _Axes, unit: str) -> Html:
    y = f"{axes.y(tick):.1f}"
    text = element("text", f"{tick:.3g}{unit}", x=_LEFT - 7, y=f"{axes.y(tick) + 3.8:.1f}", text_anchor="end")
    return Html(element("path", d=f"M{_LEFT} {y}H{_RIGHT}", class_="grid") + text)


def _x_tick(tick: int, axes: _Axes) -> Html:
    x = f"{axes.x(tick):.1f}"
    mark = element("path", d=f"M{x} {_BOTTOM}v4", class_="grid")
    return Html(mark + element("text", tick, x=x, y=_BOTTOM + 17, text_anchor="middle"))
