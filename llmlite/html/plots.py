"""Plots as SVG text that takes its colours from the page around it, so that the same file reads well in light, in dark and on paper.

matplotlib draws; stand-in colours become CSS variables afterwards. Without matplotlib (the extra ``report``) every function returns an empty text.
"""

from __future__ import annotations

import importlib.util
import io
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
        values: lengths; bars without a value are left out.
        labels: what is written at each bar's end.
    """
    shown = [(name, value, label, index == 0) for index, (name, value, label) in enumerate(zip(names, values, labels, strict=True)) if value is not None]
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
    """Named points and, joined by a line, those that no other beats on both axes (less is better on both)."""
    if not points or not available():
        return ""

    def draw(axes: Axes) -> None:
        on_front = sorted(points[name] for name in front)
        axes.plot([x for x, _ in on_front], [y for _, y in on_front], color=_FIRST, linewidth=1.2, linestyle="--")
        for name, (x, y) in points.items():
            axes.plot([x], [y], "o", color=_FIRST if name in front else _SECOND, markersize=6)
            axes.annotate(_short(name, 26), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8.5)
        axes.margins(x=0.22, y=0.15)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()

    return _svg(title, draw, height=3.2)


def _rectangle(x: float, y: float, width: float, height: float, share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=_FIRST, edgecolor="none", alpha=round(0.15 + 0.85 * share, 3))


def _short(name: str, limit: int = 18) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


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
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{_attribute(title)}"', text, count=1)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def _attribute(text: str) -> str:
    import html

    return html.escape(text, quote=True)
