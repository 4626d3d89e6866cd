"""The report: one row for the base and for each step, the same figures in `report.json` and in the table at the end."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from llmlite.config import problems_of, shorten
from llmlite.errors import LoadError
from llmlite.gate import collapse_warning
from llmlite.report_shape import BaseShape, Count, Details, EnvironmentShape, EvaluationShape, ExpectedShape, Number, Perplexity, RecipeShape
from llmlite.storage import read_object, write_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "SPEED_OF_STEPS",
    "Report",
    "Row",
    "busy_sentence",
    "environment",
    "held_up",
    "human_bytes",
    "human_count",
    "human_figure",
    "human_joules",
    "plan_table",
]


SPEED_OF_STEPS = (
    "Speed is that of the model in memory as each step left it: batch 1, a prompt of at most 256 tokens and 16 more, the median of 3 repeats after one that "
    "warms up, without spread. `llmlite evaluate DIR --each_step`, or `evaluate: true` in the recipe, measures what every step left, reloaded, with its spread."
)
"""What the rows' speed is, for wherever it is shown: the defaults of `llmlite.evaluation.speed.measure_speed`, said without torch."""

_BUSY = 0.2
"""Processors that other programs kept from a model that was timed, from which on its speed is doubted."""


def held_up(processors_short: float) -> bool:
    """Whether other programs kept so many processors from a model that its speed is doubted; see `llmlite.evaluation.speed.Latency`."""
    return processors_short >= _BUSY


def busy_sentence(short: Mapping[str, float]) -> str:
    """That other programs held up what was timed, in a sentence; empty where they did not.

    Args:
        short: for each model by name the processors that were kept from it; see `llmlite.evaluation.speed.Latency`.
    """
    held = {name: value for name, value in short.items() if held_up(value)}
    if not held:
        return ""
    many = "were" if len(held) > 1 else "was"
    busy = f"other programs kept up to {max(held.values()):.1f} of the processors busy"
    return f"While {', '.join(held)} {many} timed, {busy}: do not compare speeds; time again on a quiet machine."


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
        prefill_tokens_per_second, decode_tokens_per_second: of the model in memory; see `SPEED_OF_STEPS`.
        peak_memory_bytes: peak of the step's work.
        seconds: the step's work, without its evaluation.
        details: what the step itself reports.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    name: str
    parameters: Count
    bytes_on_disk: Count
    perplexity: Perplexity
    kl: Number | None = None
    top1_agreement: Number | None = None
    prefill_tokens_per_second: Number | None = None
    decode_tokens_per_second: Number | None = None
    peak_memory_bytes: Count | None = None
    seconds: Number = 0.0
    details: Details = field(default_factory=dict)

    @property
    def processors_short(self) -> float:
        """Processors that other programs kept from the model while it was timed."""
        return float(self.details.get("processors_short", 0.0))

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

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    path: Path
    recipe: RecipeShape
    evaluation: EvaluationShape
    environment: EnvironmentShape
    rows: Annotated[list[Row], pydantic.Field(min_length=1)] = field(default_factory=list)
    loading: str = ""
    base: BaseShape = field(default_factory=dict)
    """What the model card says of the base model. See `llmlite.hub.base.describe_base`."""
    reload_difference: Number | None = None
    expected: ExpectedShape = field(default_factory=dict)
    """What was expected of the result: kl, perplexity, bytes_on_disk. See `llmlite.expected`."""

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
        values = read_object(file)
        try:
            return cls.of(Path(folder), values)
        except pydantic.ValidationError as error:
            found = problems_of(error, cls)
            shown = "\n".join(f"  {shorten(problem, 300)}" for problem in found[:3]) + (f"\n  and {len(found) - 3} more" if len(found) > 3 else "")
            raise LoadError(f"{file} is no report of llmlite's. Run the recipe again, or give another folder.\n{shown}") from None

    @classmethod
    def of(cls, path: Path, values: dict[str, Any]) -> Report:
        """A report from its plain values; `path` is the folder of the result.

        Raises:
            pydantic.ValidationError: the values are of another kind; see `llmlite.report_shape`.
        """
        return _whole_report().validate_python({"rows": [], **values, "path": path})

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
            **({"energy": [_energy(row) for row in self.rows]} if self.joules() else {}),
        }

    def joules(self) -> dict[str, tuple[float, list[str], list[str]]]:
        """Energy of the steps, by kind, so that nothing measured is added to anything estimated: kind -> joules, where they come from, names of the steps."""
        found: dict[str, tuple[float, list[str], list[str]]] = {}
        for row in self.rows[1:]:
            energy = row.details.get("energy") or {}
            if energy.get("joules") is not None:
                joules, sources, steps = found.get(energy["kind"], (0.0, [], []))
                found[energy["kind"]] = (joules + energy["joules"], list(dict.fromkeys([*sources, energy["source"]])), [*steps, row.name])
        return found

    def whole_energy(self) -> tuple[float, str] | None:
        """Joules of all steps together and where they come from; None when a step has none, or measured and estimated ones would be mixed."""
        found = self.joules()
        if len(found) != 1:
            return None
        kind, (joules, sources, steps) = next(iter(found.items()))
        return (joules, f"{kind}, {' and '.join(sources)}") if len(steps) == len(self.rows) - 1 else None

    def energy_sentences(self) -> list[str]:
        """Energy of the steps for a person, and grams of CO2 where a grid was stated; empty for a run that never asked."""
        noted = [(row.name, row.details["energy"]) for row in self.rows[1:] if row.details.get("energy")]
        if not noted:
            return []
        grid, sentences = self.recipe.get("grid_grams_per_kwh"), []
        for kind, (joules, sources, steps) in self.joules().items():
            of = "all steps" if len(steps) == len(self.rows) - 1 else ", ".join(steps)
            grams = "" if grid is None else f"; {joules / 3.6e6 * grid:.3g} g CO2 at the stated {grid:g} g per kWh"
            sentences.append(f"Energy of {of}: {human_joules(joules)}, {kind} ({' and '.join(sources)}){grams}.")
        if len(sentences) > 1:
            sentences.append("What was measured and what was estimated is not added up.")
        missing = [f"{name} ({energy.get('source') or 'no reason noted'})" for name, energy in noted if energy.get("joules") is None]
        return [*sentences, f"Energy not available: {'; '.join(missing)}."] if missing else sentences

    def speed_on(self) -> str:
        """What the rows' speed is and whether to believe it, in sentences; empty where nothing was timed."""
        if not any(row.decode_tokens_per_second for row in self.rows):
            return ""
        return " ".join(filter(None, (SPEED_OF_STEPS, busy_sentence({row.name: row.processors_short for row in self.rows}))))

    def expectation(self) -> str:
        """Expected beside obtained, in a sentence; empty where nothing was expected."""
        if not self.expected or not self.rows:
            return ""
        last = self.rows[-1]
        told: dict[str, Callable[[float], str]] = {
            "kl": lambda value: f"KL {value:.4f}, obtained {last.kl or 0:.4f}",
            "perplexity": lambda value: f"perplexity {value:.4g}, obtained {last.perplexity:.4g}",
            "bytes_on_disk": lambda value: f"{human_bytes(value)} on disk, obtained {human_bytes(last.bytes_on_disk)}",
        }
        return f"Expected {'; '.join(tell(self.expected[name]) for name, tell in told.items() if name in self.expected)}."

    def warning(self) -> str:
        """That the result is far from its base, in a sentence; empty where it is not."""
        if len(self.rows) < 2:
            return ""
        base, this = self.rows[0], self.rows[-1]
        return collapse_warning(base.perplexity, this.perplexity, this.kl, this.top1_agreement)

    def table(self) -> Table:
        """`lines` for a terminal: a column for the base and for each step, a row for each figure."""
        from rich.table import Table

        table = Table(title=f"{self.path}", title_justify="left", caption=self.speed_on() or None, caption_justify="left")
        table.add_column("")
        for row in self.rows:
            table.add_column(row.name, justify="right", no_wrap=True)
        for name, cells in self.lines().items():
            table.add_row(name, *cells)
        return table


@functools.cache
def _whole_report() -> pydantic.TypeAdapter[Report]:
    return pydantic.TypeAdapter(Report)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _energy(row: Row) -> str:
    energy = row.details.get("energy") or {}
    return "" if energy.get("joules") is None else f"{human_joules(energy['joules'])}, {energy['kind']}"


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


def human_figure(value: float, digits: int = 4) -> str:
    """A figure for a person: 15,034 rather than 1.503e+04. What is a million or more stays short."""
    return f"{value:,.0f}" if 10**digits <= value < 1e6 else f"{value:.{digits}g}"


def human_joules(joules: float) -> str:
    """Energy for a person: 3.6 MJ is a kilowatt hour."""
    for unit in ("J", "kJ"):
        if joules < 1000:
            return f"{joules:.3g} {unit}"
        joules /= 1000
    return f"{joules:,.4g} MJ"
