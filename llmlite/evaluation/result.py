"""What `llmlite evaluate` found: the figures of a base, of a result and of the steps between them, side by side, as JSON, as lines of text, as a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.errors import counted
from llmlite.gate import collapse_warning
from llmlite.report import busy_sentence, human_bytes
from llmlite.storage import write_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EVALUATION", "Evaluation"]

EVALUATION = "evaluation.json"

_MANY = 20
"""Repeats from which on the 95th percentile is not simply one of the two slowest."""

_LATENCY: dict[str, Callable[[dict[str, Any]], str]] = {
    "TTFT ms, p50 / p95": lambda one: f"{1e3 * one['ttft_p50']:.0f} / {1e3 * one['ttft_p95']:.0f}",
    "TPOT ms, p50 / p95": lambda one: f"{1e3 * one['tpot_p50']:.1f} / {1e3 * one['tpot_p95']:.1f}",
    "prefill tokens/s": lambda one: f"{one['prefill_tokens_per_second']:.0f}",
    "decode tokens/s": lambda one: f"{one['decode_tokens_per_second']:.1f}",
    "peak memory": lambda one: human_bytes(one["peak_memory_bytes"]),
}


@dataclass
class Evaluation:
    """Figures of a base and of what was made of it.

    Attributes:
        path: the folder that was evaluated.
        about: text, window, stride, tokens, machine, versions, date.
        models: ``base``, then what each step left by the name of its folder where steps were measured, and last ``this``; each has bytes_on_disk, perplexity,
            kl, top1_agreement, latency (see `llmlite.evaluation.speed.Latency`), energy and joules_per_1000_tokens, tasks, answers, and `step`, its number and
            name, where a step left it and steps were asked for.
    """

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the folder's place."""
        return {"about": self.about, "models": self.models}

    @classmethod
    def read(cls, folder: Path) -> Evaluation | None:
        """What `save` wrote into a folder; None where nothing was, or something that cannot be shown."""
        try:
            values = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
            found = cls(folder, values["about"], values["models"])
            whole = isinstance(found.about, dict) and isinstance(found.about.get("quality_on", ""), str)
            _ = found.headings(), found.lines(), found.warning(), found.speed_on(), found.grid(), [asked["prompt"] for asked, _ in found.answers()]
        except (OSError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, StopIteration, RecursionError):
            return None
        return found if whole else None

    def save(self) -> Path:
        """Write ``evaluation.json`` into the folder."""
        write_json(self.path / EVALUATION, self.to_json())
        return self.path / EVALUATION

    def headings(self) -> list[str]:
        """What each model is called above its column."""
        return [" = ".join(filter(None, (model.get("step"), name if name in ("base", "this") else ""))) for name, model in self.models.items()]

    def title(self) -> str:
        """What the figures are, for wherever they stand."""
        return f"Measured afterwards, {'both' if len(self.models) < 3 else 'each'} loaded from disk"

    def answers(self) -> list[tuple[dict[str, str], list[tuple[str, str]]]]:
        """For each held-out prompt the prompt with what is expected, and the answers by headings of those models that were asked: an offloaded one is not."""
        asked = {name: model["answers"] for name, model in zip(self.headings(), self.models.values(), strict=True) if model.get("answers")}
        return [(given[0], [(name, one["answer"]) for name, one in zip(asked, given, strict=True)]) for given in zip(*asked.values(), strict=False)]

    def lines(self) -> dict[str, list[str]]:
        """A name, then a cell for each model."""
        models = list(self.models.values())
        rows: dict[str, list[str]] = {
            "on disk": [human_bytes(model["bytes_on_disk"]) for model in models],
            "perplexity": [f"{model['perplexity']:.4g}" for model in models],
            "KL to the base": ["" if model["kl"] is None else f"{model['kl']:.4f}" for model in models],
            "top-1 as the base": ["" if model["top1_agreement"] is None else f"{model['top1_agreement']:.1%}" for model in models],
        }
        for name in dict.fromkeys(task["task"] for model in models for task in model["tasks"]):
            results = [next(task for task in model["tasks"] if task["task"] == name) for model in models]
            rows[f"{name} ({results[0]['metric']})"] = [_task(task) for task in results]
            rows[f"  {name}: answers flipped"] = ["" if task["flips"] is None else f"{task['flips']:.1%}" for task in results]
        timed = [model["latency"] for model in models if model["latency"]]  # none of a model that is brought in part by part
        for place in range(len(timed[0]) if timed else 0):
            found = [model["latency"][place] if model["latency"] else None for model in models]
            at = f"batch {timed[0][place]['batch']}: "
            rows |= {f"{at}{name}": ["" if one is None else cell(one) for one in found] for name, cell in _LATENCY.items()}
        sources = {_source(model) for model in models}
        if len(sources) == 1 and "" not in sources:
            rows[f"J per 1,000 tokens ({sources.pop()})"] = [f"{model['joules_per_1000_tokens']:.3g}" for model in models]
        else:
            rows["J per 1,000 tokens"] = [f"{model['joules_per_1000_tokens']:.3g} ({source})" if (source := _source(model)) else _NONE for model in models]
        if any(model.get("grams_co2_per_1000_tokens") is not None for model in models):
            grams = [model.get("grams_co2_per_1000_tokens") for model in models]
            rows["g CO2 per 1,000 tokens"] = ["" if one is None else f"{one:.3g}" for one in grams]
        return rows

    def warning(self) -> str:
        """That the result is far from its base, in a sentence; empty where it is not."""
        base, this = self.models["base"], self.models["this"]
        return collapse_warning(base["perplexity"], this["perplexity"], this["kl"], this["top1_agreement"])

    def speed_on(self) -> str:
        """How speed was measured, in a sentence; empty where it was not."""
        timed = next((model["latency"][0] for model in self.models.values() if model["latency"]), None)
        if timed is None:
            return ""
        latencies = zip(self.headings(), (model["latency"] for model in self.models.values()), strict=True)
        busy = busy_sentence({name: max(one.get("processors_short", 0.0) for one in found) for name, found in latencies if found})
        measured = (
            f"Speed of the reloaded models: {counted(timed['repeats'], 'repeat')} after one that warms up, prompts of "
            f"{counted(timed['prompt_tokens'], 'random token')} and {timed['new_tokens']} more; p50 is the median over them, p95 the 95th percentile"
            + (": of so few first tokens nearly the slowest." if timed["repeats"] < _MANY else ".")
        )
        return " ".join(filter(None, (measured, busy)))

    def grid(self) -> str:
        """The grid that grams of CO2 are of, in a sentence after a space; empty where none was stated."""
        grams = next((model["grid_grams_per_kwh"] for model in self.models.values() if model.get("grid_grams_per_kwh") is not None), None)
        return "" if grams is None else f" CO2 at a stated {grams:g} g per kWh."

    def table(self) -> Table:
        """`lines` for a terminal."""
        from rich.table import Table

        how = "\n".join(filter(None, (self.about["quality_on"], self.speed_on())))
        table = Table(title=f"{self.path}", title_justify="left", caption=how, caption_justify="left")
        table.add_column("", no_wrap=len(self.models) < 5, overflow="fold")  # with more, words make room for figures
        for name in self.headings():
            table.add_column(name, justify="right", no_wrap=len(self.models) < 3, overflow="fold")  # no digit is cut
        for name, cells in self.lines().items():
            table.add_row(name, *cells)
        return table


def _task(task: dict[str, Any]) -> str:
    error = "" if task["standard_error"] is None else f" ± {task['standard_error']:.3f}"
    return f"{task['value']:.3f}{error}"


_NONE = "not available"


def _source(model: dict[str, Any]) -> str:
    """What kind of figure the energy is and where it comes from; empty where there is none."""
    return "" if model["joules_per_1000_tokens"] is None else f"{model['energy']['kind']}, {model['energy']['source']}"
