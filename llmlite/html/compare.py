"""Several runs beside each other: quality against bytes and against speed, with the Pareto front."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmlite.errors import OutputError, counted
from llmlite.html import plots
from llmlite.html.page import render
from llmlite.paths import require_path
from llmlite.report import Report, Row, human_bytes, human_count, human_figure

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "compare", "pareto_front"]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: of the runs, behind ``base``.
        reports: one for each run.
        base: name of the base model.
        front: names that no other beats on both bytes and perplexity.
        fast_front: names that no other beats on both the time of a written token and perplexity.
        warnings: what makes the figures hard to compare.
    """

    names: list[str]
    reports: list[Report]
    base: str
    front: list[str]
    fast_front: list[str]
    warnings: list[str]

    def cells(self) -> list[list[str]]:
        """The table: a header and a row for the base and each run."""
        header = ["run", "front", "parameters", "on disk", "perplexity", "change", "KL", "top-1", "prefill", "decode", "steps"]
        base = self.reports[0].rows[0]
        return [header] + [
            [
                name,
                ", ".join(word for word, front in (("size", self.front), ("speed", self.fast_front)) if name in front),
                human_count(row.parameters),
                human_bytes(row.bytes_on_disk),
                human_figure(row.perplexity),
                "" if row is base else f"{row.perplexity / base.perplexity - 1:+.1%}",
                "" if row.kl is None else f"{row.kl:.4f}",
                "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
                _ratio(row.prefill_tokens_per_second, own.prefill_tokens_per_second),
                _ratio(row.decode_tokens_per_second, own.decode_tokens_per_second),
                steps,
            ]
            for name, row, own, steps in self._rows()
        ]

    def _rows(self) -> list[tuple[str, Row, Row, str]]:
        """Name, figures, figures of its own run's base (speeds are only comparable within a run), and the steps, of the base and each run."""
        base = self.reports[0].rows[0]
        return [(self.names[0], base, base, "")] + [
            (name, report.rows[-1], report.rows[0], " > ".join(row.name for row in report.rows[1:]))
            for name, report in zip(self.names[1:], self.reports, strict=True)
        ]

    def table(self) -> Table:
        """The same for a terminal."""
        from rich.table import Table

        table = Table(caption="speeds as multiples of the base, each measured in its own run", caption_justify="left")
        names, *figures = zip(*self.cells(), strict=True)
        for index, name in enumerate(names):
            table.add_column(name if index else "", justify="right" if index else "left", overflow="fold")
        for cells in figures:
            table.add_row(*cells)
        return table

    def page(self) -> str:
        """The same as a self-contained HTML page, with plots."""
        numbers = {name: str(number) for number, name in enumerate(self.names)}
        rows = [(numbers[name], row, own) for name, row, own, _ in self._rows()]
        size = {number: (row.bytes_on_disk / 1e6, row.perplexity) for number, row, _ in rows if row.perplexity < 1e6}
        pace = {number: (time, row.perplexity) for number, row, own in rows if (time := _token_time(row, own)) is not None and row.perplexity < 1e6}
        drawn = [
            (
                "Perplexity against megabytes",
                plots.scatter_front("size", size, pareto_front(size), "megabytes on disk", "perplexity"),
            ),
            (
                "Perplexity against the time of a written token",
                plots.scatter_front("speed", pace, pareto_front(pace), "time of a token, the base's in the same run = 1", "perplexity"),
            ),
        ]
        header, *lines = self.cells()
        return render(
            "compare.html.jinja",
            title=f"{counted(len(self.reports), 'run')} compared",
            summary=f"All against their base, {self.base}, on {self.reports[0].evaluation.get('text', 'held-out text')}.",
            warnings=self.warnings,
            header=header[1:-1],
            runs=[{"number": numbers[cells[0]], "name": cells[0], "steps": cells[-1], "cells": cells[1:-1]} for cells in lines],
            plots=[{"title": title, "svg": svg} for title, svg in drawn if svg],
        )


def compare(folders: Sequence[Path | str]) -> Comparison:
    """Read the reports of finished runs.

    Args:
        folders: results of runs, each with a report.json.

    Raises:
        OutputError: a folder without a report.
        LoadError: a report that is not whole.
    """
    reports = []
    for folder in [require_path(folder, "compare", "DIR") for folder in folders]:
        if not (folder / "report.json").is_file():
            raise OutputError(f"compare: {folder} has no report.json, so it is not the result of a finished run.")
        reports.append(Report.read(folder))
    base_names = [str((report.recipe.get("model") or {}).get("name", "base")) for report in reports]
    names = ["base", *_distinct([report.path for report in reports])]
    warnings = []
    if len(set(base_names)) > 1:
        warnings.append(f"The runs have different bases: {', '.join(sorted(set(base_names)))}. Changes are against the first.")
    if len({report.rows[0].details.get("text") for report in reports}) > 1:
        warnings.append("The runs were measured on different held-out text, so perplexity, KL and agreement cannot be compared between them.")
    warnings += [f"{name}: {text}" for name, report in zip(names[1:], reports, strict=True) if (text := report.warning())]
    found = Comparison(names, reports, base_names[0].rstrip("/").rpartition("/")[2], [], [], warnings)
    rows = found._rows()
    size = {name: (float(row.bytes_on_disk), row.perplexity) for name, row, *_ in rows}
    pace = {name: (time, row.perplexity) for name, row, own, _ in rows if (time := _token_time(row, own)) is not None}
    return dataclasses.replace(found, front=pareto_front(size), fast_front=pareto_front(pace))


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other point beats or equals on both axes, less being better."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for other, (a, b) in points.items() if other != name)

    return [name for name in points if not beaten(name)]


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(one[-1:])} ({index + 1})" for index, one in enumerate(parts)]


def _token_time(row: Row, own: Row) -> float | None:
    """Time of a written token as a multiple of the base's in the same run."""
    return own.decode_tokens_per_second / row.decode_tokens_per_second if row.decode_tokens_per_second and own.decode_tokens_per_second else None


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else ""
