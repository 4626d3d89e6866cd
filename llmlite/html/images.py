"""Plots of a run as small PNG images for its model card: one file each, on white, readable in any theme, the same bytes for the same figures.

The Hub shows images that lie in the repository and that the card names by their file; SVG there is not shown everywhere, so these are pixels.
matplotlib draws; without it (the extra ``report``) there are no images.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from llmlite.html.plots import available
from llmlite.report import Report, Row, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CURVE", "OVERVIEW", "card_images"]

OVERVIEW, CURVE = "base_against_this.png", "training_loss.png"
_BASE, _THIS = "#9aa5b1", "#2f6db5"
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "savefig.facecolor": "white",
    "text.parse_math": False,  # names are names, whatever is in them
}


def card_images(report: Report) -> dict[str, bytes]:
    """File name -> PNG: bytes and perplexity of the base and after each step; the training loss of the step that trained last, where one did."""
    if not available() or len(report.rows) < 2:
        return {}
    images = {OVERVIEW: _overview(report.rows)}
    trained = [row for row in report.rows if len(row.details.get("train_loss") or []) > 1]
    if trained:
        images[CURVE] = _curve(trained[-1])
    return images


def _overview(rows: list[Row]) -> bytes:
    names = [row.name for row in rows]

    def bars(axes: Axes, title: str, values: list[float], labels: list[str]) -> None:
        places = range(len(values))
        shown = [value if math.isfinite(value) and value < 1e30 else 0.0 for value in values]
        axes.barh(places, shown, color=[_BASE, *[_THIS] * (len(values) - 1)], height=0.6)
        axes.set_yticks(places, [name if len(name) < 22 else f"{name[:20]}…" for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, max(shown) * 1.3 or 1)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(title)
        for place, (value, label) in enumerate(zip(shown, labels, strict=True)):
            axes.annotate(label, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)

    def draw(axes: list[Axes]) -> None:
        bars(axes[0], "Bytes of the weights", [float(row.bytes_on_disk) for row in rows], [human_bytes(row.bytes_on_disk) for row in rows])
        bars(axes[1], "Perplexity on held-out text", [row.perplexity for row in rows], [f"{row.perplexity:.4g}" for row in rows])

    return _png(draw, 2, 7.6, 0.75 + 0.3 * len(rows))


def _curve(row: Row) -> bytes:
    history = row.details["train_loss"]

    def draw(axes: list[Axes]) -> None:
        axes[0].plot([entry["step"] for entry in history], [entry["loss"] for entry in history], color=_THIS, linewidth=1.6)
        axes[0].set_title(f"{row.name}: training loss")
        axes[0].set_xlabel("optimizer step")
        axes[0].grid(axis="y")

    return _png(draw, 1, 5.0, 2.4)


def _png(draw: Any, columns: int, width: float, height: float) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        draw([figure.add_subplot(1, columns, place + 1) for place in range(columns)])
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})  # nothing in the file but the picture
    return file.getvalue()
