"""The report: one row for the base and for each step, the same figures in `report.json` and in the table at the end."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.errors import LoadError
from llmlite.storage import read_object, write_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report", "Row", "environment", "human_bytes", "human_count", "plan_table"]


@dataclass(frozen=True)
class Row:
    """Figures of the base or of one step's result.

    Attributes:
        name: ``base`` or the step's name.
        parameters: parameters of the model, adapters included.
        bytes_on_disk: bytes of the safetensors files that are needed to load it.
        perplexity: exp of the mean negative log-likelihood of the held-out trained tokens.
        kl: mean KL divergence from the base's distribution on the same tokens, nats a token.
        top1_agreement: share of these tokens on which the most likely token is the base's.
        prefill_tokens_per_second, decode_tokens_per_second: batch 1; see `llmlite.evaluation.speed`.
        peak_memory_bytes: peak of the step's work.
        seconds: the step's work, without its evaluation.
        details: what the step itself reports.
    """

    name: str
    parameters: int
    bytes_on_disk: int
    perplexity: float
    kl: float | None = None
    top1_agreement: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    def worst_layers(self) -> str:
        """The layers whose output the step changed most, in a sentence, with what the step suggests; empty where no layer was measured."""
        worst = ", ".join(f"{one['layer']} {one['relative_output_error']:.2g}" for one in self.details.get("worst_layers") or ())
        mean = self.details.get("mean_layer_error")
        if not worst or mean is None:
            return ""
        sentence = f"Relative output error of a layer on calibration text: {mean:.2g} on average, largest in {worst}."
        return " ".join(filter(None, (sentence, self.details.get("suggestion"))))


@dataclass
class Report:
    """All rows of a run and how it was made. `path` is the folder of the result."""

    path: Path
    recipe: dict[str, Any]
    evaluation: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    loading: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    """What the model card says of the base model. See `llmlite.hub.base.describe_base`."""
    reload_difference: float | None = None
    expected: dict[str, float] = field(default_factory=dict)
    """What `llmlite shrink` expected of the result: kl, perplexity, bytes_on_disk."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the folder's place."""
        values = dataclasses.asdict(self)
        del values["path"]
        return values

    def save(self) -> None:
        """Write `report.json` into the result's folder."""
        write_json(self.path / "report.json", self.to_json())

    @classmethod
    def read(cls, folder: Path | str) -> Report:
        """Read the report of a finished run.

        Raises:
            LoadError: there is none, or it is not whole.
        """
        file = Path(folder) / "report.json"
        try:
            return cls.of(Path(folder), read_object(file))
        except (KeyError, TypeError, AttributeError) as error:
            raise LoadError(
                f"{file} is no report of llmlite's ({type(error).__name__}: {str(error)[:120]}). Run the recipe again, or give another folder."
            ) from None

    @classmethod
    def of(cls, path: Path, values: dict[str, Any]) -> Report:
        """A report from its plain values; `path` is the folder of the result."""
        return cls(path=path, **(values | {"rows": [Row(**row) for row in values["rows"]]}))

    def lines(self) -> dict[str, list[str]]:
        """The figures as text: a name, then a cell for the base and for each step; changes are against the base."""
        base = self.rows[0].perplexity if self.rows else 1.0
        return {
            "parameters": [f"{row.parameters:,}" for row in self.rows],
            "on disk": [human_bytes(row.bytes_on_disk) for row in self.rows],
            "perplexity": [f"{row.perplexity:.4g}" for row in self.rows],
            "  change": [f"{row.perplexity / base - 1:+.1%}" if index else "" for index, row in enumerate(self.rows)],
            "KL to the base": [_shown(row.kl, ".4f") for row in self.rows],
            "top-1 as the base": [_shown(row.top1_agreement, ".1%") for row in self.rows],
            "prefill tokens/s": [_shown(row.prefill_tokens_per_second, ".0f") for row in self.rows],
            "decode tokens/s": [_shown(row.decode_tokens_per_second, ".1f") for row in self.rows],
            "peak memory": ["" if row.peak_memory_bytes is None else human_bytes(row.peak_memory_bytes) for row in self.rows],
            "seconds": [f"{row.seconds:.0f}" for row in self.rows],
        }

    def expectation(self) -> str:
        """Expected beside obtained, in a sentence; empty where nothing was expected."""
        if not self.expected or not self.rows:
            return ""
        last = self.rows[-1]
        return (
            f"Expected KL {self.expected['kl']:.4f}, obtained {last.kl or 0:.4f}; "
            f"perplexity {self.expected['perplexity']:.4g}, obtained {last.perplexity:.4g}; "
            f"{human_bytes(self.expected['bytes_on_disk'])} on disk, obtained {human_bytes(last.bytes_on_disk)}."
        )

    def table(self) -> Table:
        """`lines` for a terminal: a column for the base and for each step, a row for each figure."""
        from rich.table import Table

        table = Table(title=f"{self.path}", title_justify="left")
        table.add_column("")
        for row in self.rows:
            table.add_column(row.name, justify="right", no_wrap=True)
        for name, cells in self.lines().items():
            table.add_row(name, *cells)
        return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plan_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The plan that `--dry_run` prints: one row for the base and for each step."""
    from rich.table import Table

    table = Table(title="The plan", title_justify="left", caption="\n".join(_note(row) for row in rows if row["notes"]), caption_justify="left")
    for name in ("step", "gives", "parameters", "trained", "on disk", "memory", "tokens"):
        table.add_column(name, justify="left" if name in {"step", "gives"} else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["step"],
            row["form"],
            human_count(row["parameters"]),
            human_count(row["trained_parameters"]) if row["trained_parameters"] else "",
            human_bytes(row["disk_bytes"]),
            human_bytes(row["peak_bytes"]) if row["peak_bytes"] else "",
            human_count(row["tokens"]) if row["tokens"] else "",
        )
    return table


def _note(row: dict[str, Any]) -> str:
    return f"{row['step']}: {'; '.join(row['notes'])}"


def human_count(count: float) -> str:
    """A number for a person: 134.5M."""
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f}B"


def environment(device: str) -> dict[str, Any]:
    """What figures depend on: date, versions, machine; no names of users or machines.

    Args:
        device: where they were computed, as torch names its type.
    """
    versions = {name: importlib.metadata.version(name) for name in ("llmlite", "torch", "transformers", "peft", "bitsandbytes", "accelerate")}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def human_bytes(count: float) -> str:
    """Bytes for a person: 1 MB is a million bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in {"B", "kB"} else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
