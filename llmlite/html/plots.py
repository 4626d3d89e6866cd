"""Plots as SVG text that takes its colours from the page around it, so that the same file reads well in light, in dark and on paper.

matplotlib draws; stand-in colours become CSS variables afterwards. Without matplotlib (the extra ``report``) every function returns an empty text.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["available", "bars", "layer_errors", "lines", "removed_map", "scatter_front"]

# colours that no plot uses otherwise -> what the page calls them
_INK, _LINE, _FIRST, _SECOND = "#0a0b0c", "#0a0b0d", "#0a0b0e", "#0a0b0f"
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)"}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmlite",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,  # names are names, whatever is in them
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_WIDTH = 4.6  # inches; the page scales it


def available() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def bars(title: str, names: Sequence[str], values: Sequence[float | None], labels: Sequence[str]) -> str:
    """Horizontal bars, the first (the base) in its own colour, each with its figure written beside it.

    Args:
        title: above the plot.
        names: one for each bar, from top to bottom.
        values: lengths; bars without a finite value are left out.
        labels: what is written at each bar's end.
    """
    shown = [
        (name, value, label, index == 0)
        for index, (name, value, label) in enumerate(zip(names, values, labels, strict=True))
        if value is not None and math.isfinite(value)
    ]
    if not shown or not available():
        return ""

    def draw(axes: Axes) -> None:
        places = range(len(shown))
        axes.barh(places, [value for _, value, _, _ in shown], color=[_SECOND if first else _FIRST for *_, first in shown], height=0.62)
        axes.set_yticks(places, [_short(name) for name, *_ in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, max(value for _, value, _, _ in shown) * 1.28 or 1)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        for place, (_, value, label, _) in zip(places, shown, strict=True):
            axes.annotate(label, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)

    return _svg(title, draw, height=0.55 + 0.34 * len(shown))


def lines(title: str, x: Sequence[float], series: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> str:
    """Curves over the same x, at most two of them."""
    if len(x) < 2 or not available():
        return ""

    def draw(axes: Axes) -> None:
        for (name, y), colour in zip(series.items(), (_FIRST, _SECOND), strict=False):
            axes.plot(x, y, color=colour, label=name, linewidth=1.8)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        if len(series) > 1:
            axes.legend()

    return _svg(title, draw)


def layer_errors(title: str, values: Sequence[float], y_label: str, marked: Sequence[int] = ()) -> str:
    """A bar for each layer of the model; `marked` ones in the other colour."""
    if not values or not available():
        return ""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(values)), values, color=[_SECOND if index in marked else _FIRST for index in range(len(values))])
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        axes.set_axisbelow(True)

    return _svg(title, draw)


def removed_map(title: str, removed: Sequence[Sequence[int]], units: int, unit: str, buckets: int = 48) -> str:
    """A heat map: layers by units, darker where more of them went.

    Args:
        title: above the plot.
        removed: for each layer the units that went.
        units: units of a layer before.
        unit: what they are, for the axis.
        buckets: columns at most; neighbours share one when there are more units.
    """
    if not removed or not units or not available():
        return ""
    columns = min(units, buckets)
    shares = [[0.0] * columns for _ in removed]
    widths = [0] * columns
    for index in range(units):
        widths[index * columns // units] += 1
    for row, gone in zip(shares, removed, strict=True):
        for index in gone:
            row[index * columns // units] += 1 / widths[index * columns // units]

    def draw(axes: Axes) -> None:
        for layer, row in enumerate(shares):
            for column, share in enumerate(row):
                if share > 0:
                    axes.add_patch(_rectangle(column / columns * units, layer - 0.5, units / columns, 1, min(share, 1.0)))
        axes.set_xlim(0, units)
        axes.set_ylim(len(removed) - 0.5, -0.5)
        axes.locator_params(integer=True)
        axes.set_xlabel(f"{unit}, of {units}")
        axes.set_ylabel("layer")

    return _svg(title, draw, height=max(1.6, min(4.0, 0.9 + 0.09 * len(removed))))


def scatter_front(title: str, points: Mapping[str, tuple[float, float]], front: Sequence[str], x_label: str, y_label: str) -> str:
    """Named points and, joined by a line, those that no other beats on both axes (less is better on both).

    Names are best short, numbers say: each stands beside its point where no other name and no point is, with a line to it when that is further away.
    """
    if not points or not available():
        return ""

    def draw(axes: Axes) -> None:
        on_front = sorted(points[name] for name in front)
        axes.plot([x for x, _ in on_front], [y for _, y in on_front], color=_FIRST, linewidth=1.2, linestyle="--")
        for name, (x, y) in points.items():
            axes.plot([x], [y], "o", color=_FIRST if name in front else _SECOND, markersize=6)
        axes.margins(x=0.16, y=0.18)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()
        _name_points(axes, points)

    return _svg(title, draw, height=3.2)


_LETTER, _LINE_HEIGHT = 6.2, 11.0  # points: about what a letter and a line of the labels take


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside their points, each at the nearest place that touches neither a point nor a name. Axes are laid out first."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = 72 / axes.figure.dpi
    places = {name: axes.transData.transform(point) * scale for name, point in points.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    for name, (x, y) in places.items():
        half_width, half_height = (_LETTER * len(_short(name, 26)) + 2) / 2, _LINE_HEIGHT / 2

        def box(at: tuple[float, float], x: float = x, y: float = y, w: float = half_width, h: float = half_height) -> tuple[float, float, float, float]:
            return x + at[0] - w, y + at[1] - h, x + at[0] + w, y + at[1] + h

        turns = [(math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)) for turn in (2, 6, 14, 10, 0, 8, 4, 12, 1, 3, 5, 7, 9, 11, 13, 15)]
        offers = [(along * (far + half_width - 4), up * (far + half_height - 4)) for far in (9, 15, 22, 30, 40, 52) for along, up in turns]
        best = min(offers, key=lambda at: sum(_overlap(box(at), other) for other in taken))  # the first, and so the nearest, of those that touch nothing
        taken.append(box(best))
        far = math.hypot(*best) > 14 + half_width
        axes.annotate(
            _short(name, 26),
            points[name],
            xytext=best,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": _INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if far else None,
        )


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))


def _rectangle(x: float, y: float, width: float, height: float, share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=_FIRST, edgecolor="none", alpha=round(0.15 + 0.85 * share, 3))


def _short(name: str, limit: int = 18) -> str:
    """A name with its middle left out: names of runs and steps differ at their ends."""
    return name if len(name) <= limit else f"{name[: (limit - 1) // 2]}…{name[-(limit // 2) :]}"


def _svg(title: str, draw: Any, height: float = 2.6) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure: Figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        draw(axes)
        axes.tick_params(length=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    text = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', lambda found: f'{found[1]} role="img" aria-label="{_attribute(title)}"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _attribute(text: str) -> str:
    import html

    return html.escape(text, quote=True)
