"""Several runs beside each other: quality against bytes and against speed, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmlite.errors import OutputError
from llmlite.html import plots
from llmlite.html.page import render
from llmlite.paths import require_path
from llmlite.report import Report, human_bytes

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
        warnings: what makes the figures hard to compare.
    """

    names: list[str]
    reports: list[Report]
    base: str
    front: list[str]
    warnings: list[str]

    def cells(self) -> list[list[str]]:
        """The table: a header and a row for the base and each run."""
        header = ["run", "front", "parameters", "on disk", "perplexity", "change", "KL", "top-1", "prefill", "decode", "steps"]
        base = self.reports[0].rows[0]
        rows = [(self.names[0], base, "")] + [
            (name, report.rows[-1], " > ".join(row.name for row in report.rows[1:])) for name, report in zip(self.names[1:], self.reports, strict=True)
        ]
        return [header] + [
            [
                name,
                "front" if name in self.front else "",
                f"{row.parameters:,}",
                human_bytes(row.bytes_on_disk),
                f"{row.perplexity:.4g}",
                "" if row is base else f"{row.perplexity / base.perplexity - 1:+.1%}",
                "" if row.kl is None else f"{row.kl:.4f}",
                "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
                _ratio(row.prefill_tokens_per_second, base.prefill_tokens_per_second),
                _ratio(row.decode_tokens_per_second, base.decode_tokens_per_second),
                steps,
            ]
            for name, row, steps in rows
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
        base = self.reports[0].rows[0]
        rows = {self.names[0]: base} | {name: report.rows[-1] for name, report in zip(self.names[1:], self.reports, strict=True)}
        size = {name: (row.bytes_on_disk / 1e6, row.perplexity) for name, row in rows.items() if row.perplexity < 1e6}
        pace = {
            name: (1 / row.decode_tokens_per_second * 1000, row.perplexity)
            for name, row in rows.items()
            if row.decode_tokens_per_second and row.perplexity < 1e6
        }
        drawn = [
            (
                "Perplexity against megabytes (down and left is better)",
                plots.scatter_front("size", size, pareto_front(size), "megabytes on disk", "perplexity"),
            ),
            ("Perplexity against milliseconds for a written token", plots.scatter_front("speed", pace, pareto_front(pace), "ms for each token", "perplexity")),
        ]
        return render(
            "compare.html.jinja",
            title=f"{len(self.reports)} runs compared",
            summary=f"All against their base, {self.base}, on {self.reports[0].evaluation.get('text', 'held-out text')}.",
            warnings=self.warnings,
            table=self.cells(),
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
    points = {names[0]: (float(reports[0].rows[0].bytes_on_disk), reports[0].rows[0].perplexity)}
    points |= {name: (float(report.rows[-1].bytes_on_disk), report.rows[-1].perplexity) for name, report in zip(names[1:], reports, strict=True)}
    return Comparison(names, reports, base_names[0].rstrip("/").rpartition("/")[2], pareto_front(points), warnings)


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


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else ""
