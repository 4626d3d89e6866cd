"""The model card, `README.md`: written from the run's own report, so that no figure in it was typed by hand.

Metadata as the Hub validates it (Mitchell et al. 2019, arXiv:1810.03993, for what a card should tell), the base against the result, the
lines that load it, how it was made with the whole recipe, and what was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmlite.config import to_yaml
from llmlite.errors import counted
from llmlite.evaluation.result import Evaluation
from llmlite.html.images import CURVE, OVERVIEW, card_images
from llmlite.hub.base import base_of
from llmlite.hub.lines import adapter_loader, loading_snippet
from llmlite.hub.published import hub_dataset, public_evaluation, published
from llmlite.report import Report, Row, human_bytes
from llmlite.storage import read_object

__all__ = ["LAST_LINE", "fenced", "is_ours", "model_card", "plain", "write_card"]


def model_card(report: Report | None, folder: Path, repo_id: str | None = None, base_model: str | None = None) -> str:
    """The whole card.

    Args:
        report: of the run; None for a folder that llmlite did not make.
        folder: the result.
        repo_id: where it will be; None names the folder.
        base_model: Hub id of the base, when the run did not know it.
    """
    evaluation = Evaluation.read(folder)
    if report is not None:
        if evaluation is not None:
            evaluation = Evaluation(folder, **public_evaluation(report, evaluation.to_json()))
        report = published(report)
    is_adapter = (folder / "adapter_config.json").is_file()
    place = repo_id or folder.absolute().name
    title = place.rpartition("/")[2]
    snippet = loading_snippet(place, _adapter_base(report, folder) if is_adapter else None, base_model)
    parts = [_metadata(report, folder, title, is_adapter, base_model), f"# {title}", _sentence(report, is_adapter, base_model), _warning(report)]
    if report is not None and report.rows:
        parts += ["## The base against this", _table(report), _pictures(report), _conditions(report)]
    if evaluation is not None:
        parts += [f"## {evaluation.title()}", _warning(evaluation), _evaluated(evaluation)]
    parts += ["## Load it", f"```python\n{snippet}\n```", _loading_note(report, is_adapter, base_model)]
    if report is not None:
        parts += [
            "## How it was made",
            _made(report),
            "The whole recipe:",
            fenced(to_yaml(report.recipe), "yaml"),
            "## What was not measured",
            _not_measured(report, evaluation),
        ]
    return "\n\n".join(part for part in [*parts, LAST_LINE] if part) + "\n"


def write_card(report: Report) -> Path:
    """Write the card of a finished run and its images into its folder, unless somebody has written another one there. Returns its place."""
    file = report.path / "README.md"
    text = model_card(report, report.path)
    if not file.exists() or is_ours(file.read_text(encoding="utf-8")):
        file.write_text(text, encoding="utf-8")
        for name, image in card_images(published(report)).items():
            (report.path / name).write_bytes(image)
    return file


def is_ours(card: str) -> bool:
    """Whether a card is as `model_card` wrote it, to be written anew freely; a person's edit takes the last line out or stays ours to keep."""
    return card.rstrip().endswith(LAST_LINE)


LAST_LINE = "<!-- Written by llmlite from report.json. Remove this line to keep your own changes when the card is written again. -->"


def _adapter_base(report: Report | None, folder: Path) -> dict[str, Any]:
    loader = adapter_loader(folder)
    if report is not None and report.base:
        return {**report.base, "loader": loader}
    config = read_object(folder / "adapter_config.json")
    return {"name": str(config.get("base_model_name_or_path") or "BASE"), "loader": loader}


def _metadata(report: Report | None, folder: Path, title: str, is_adapter: bool, base_model: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base = base_of(report, base_model)
    known = report.base if report is not None else {}
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantization = config.get("quantization_config") or known.get("quantization_config") or {}
    steps = _steps(report)
    data: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": known.get("license"),
        "license_name": known.get("license_name"),
        "license_link": known.get("license_link"),
        "language": known.get("language"),
        "tags": ["llmlite", *dict.fromkeys(str(step["step"]) for step in steps if ":" not in str(step["step"])), *_quantization_tags(quantization)],
    }
    if base:
        only_quantized = bool(quantization) and all(step["step"] == "quantize" for step in steps)
        data |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "quantized" if only_quantized else "finetune"}
    energy, grid = report.whole_energy() if report is not None else None, (report.recipe.get("grid_grams_per_kwh") if report is not None else None)
    if energy is not None and grid is not None:
        data["co2_eq_emissions"] = {"emissions": round(energy[0] / 3.6e6 * grid, 6), "source": f"{energy[1]}; grid of {grid:g} g per kWh, stated by the maker"}
    trained_on = hub_dataset(report)
    if trained_on and any("learning_rate" in step for step in steps):
        data["datasets"] = [trained_on]
    if report is not None and report.rows:
        text = str(report.evaluation.get("text", "held-out text"))
        data["model_name"] = title
        data["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type=trained_on or "custom",
                dataset_name=text,
                metric_type="perplexity",
                metric_value=round(report.rows[-1].perplexity, 4),
            )
        ]
    return f"---\n{ModelCardData(**{key: value for key, value in data.items() if value}).to_yaml()}\n---"


def _quantization_tags(settings: Mapping[str, Any]) -> list[str]:
    if not settings:
        return []
    if settings.get("load_in_8bit"):
        return ["bitsandbytes", "8-bit"]
    return ["bitsandbytes", "4-bit", str(settings.get("bnb_4bit_quant_type", "nf4"))] if settings.get("load_in_4bit") else []


def _steps(report: Report | None) -> list[dict[str, Any]]:
    return [step if isinstance(step, dict) else {"step": step} for step in (report.recipe.get("steps") or [])] if report is not None else []


def _sentence(report: Report | None, is_adapter: bool, base_model: str | None) -> str:
    base = base_of(report, base_model)
    named = f"[{base}](https://huggingface.co/{base})" if base else (report.base.get("name") if report is not None else None)
    of = f" of {named}" if named else ""
    if is_adapter:
        quantization = report.base.get("quantization_config", {}) if report is not None else {}
        bits = " in 8 bit" if quantization.get("load_in_8bit") else " in 4 bit" if quantization.get("load_in_4bit") else ""
        trained = f", trained on that model{bits}" if bits else ""
        sentence = f"An adapter for {named or 'a base model'}{trained}. It is loaded on top of the base and holds none of its weights."
        if tokens := _added_tokens(report):
            sentence += f" It adds tokens ({', '.join(tokens)}), whose rows it brings: use its own tokenizer."
    else:
        steps = [str(step["step"]) for step in _steps(report)]
        sentence = f"A smaller or finetuned version{of}{', made by ' + ', then '.join(steps) if steps else ''}. It loads with unmodified transformers."
        if tokens := _added_tokens(report):
            sentence += f" Tokens were added: {', '.join(tokens)}."
    if report is not None and report.base.get("weights"):
        sentence += f" The base's weights came from {report.base['weights']} and differ by their rounding from those in the repository."
    return sentence


def _added_tokens(report: Report | None) -> list[str]:
    return [plain(token) for token in (report.recipe.get("model") or {}).get("add_tokens") or []] if report is not None else []


def _table(report: Report) -> str:
    base, this = report.rows[0], report.rows[-1]
    lines: list[tuple[str, str, str, str]] = []

    def add(name: str, before: float | None, after: float | None, form: Any, change: bool = True) -> None:
        if after is None:
            return
        relative = f"{after / before - 1:+.1%}" if change and before else ""
        lines.append((name, "" if before is None else form(before), form(after), relative))

    add("parameters", base.parameters, this.parameters, lambda x: f"{x:,}")
    add("bytes of the weights, as needed to load it", base.bytes_on_disk, this.bytes_on_disk, human_bytes)
    add("perplexity", base.perplexity, this.perplexity, lambda x: f"{x:.4g}")
    add("KL divergence from the base, nats a token", None, this.kl, lambda x: f"{x:.4f}")
    add("most likely token is the base's", None, this.top1_agreement, lambda x: f"{x:.1%}")
    add("prefill, tokens a second", base.prefill_tokens_per_second, this.prefill_tokens_per_second, lambda x: f"{x:.0f}")
    add("decode, tokens a second", base.decode_tokens_per_second, this.decode_tokens_per_second, lambda x: f"{x:.1f}")
    if (energy := report.whole_energy()) is not None:
        add(f"energy of all steps, joules ({energy[1]})", None, energy[0], lambda x: f"{x:.3g}")
    add("peak memory of making and loading it", base.peak_memory_bytes, this.peak_memory_bytes, human_bytes)
    return "\n".join(["| | base | this | change |", "|---|---:|---:|---:|", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _pictures(report: Report) -> str:
    """The images that lie beside the card, named by file so that the Hub finds them."""
    this, images = report.rows[-1], card_images(report)
    told = {
        OVERVIEW: f"Bytes and perplexity of the base and after each step; at the end {human_bytes(this.bytes_on_disk)}, perplexity {this.perplexity:.4g}",
        CURVE: "Training loss over the optimizer steps",
    }
    return "\n\n".join(f"![{told[name]}]({name})" for name in images)


def _conditions(report: Report) -> str:
    about, text = report.environment, report.evaluation
    versions = ", ".join(f"{name} {about[name]}" for name in ("llmlite", "torch", "transformers", "peft", "bitsandbytes") if about.get(name))
    source = plain(str(text.get("text", "held-out text")))
    machine = f"{about.get('device', '?')} ({about.get('cpu', '?')}, {counted(about.get('cores', '?'), 'core')})"
    quality = f"Perplexity, KL and agreement on {counted(text.get('tokens', '?'), 'token')} ({counted(text.get('examples', '?'), 'example')}) of {source}."
    cost = f"Speed and memory on {machine}, batch 1."
    return " ".join(filter(None, (quality, cost, report.speed_on(), f"{versions}. {about.get('date', '')}.")))


def _loading_note(report: Report | None, is_adapter: bool, base_model: str | None) -> str:
    if report is None:
        return ""
    notes = []
    if report.reload_difference is not None:
        difference = f"{report.reload_difference:.1e}"
        notes.append(f"Before publishing, stock libraries loaded the same files in a fresh process; the largest difference of a logit was {difference}.")
    if is_adapter and base_of(report, base_model) is None:
        notes.append(f"The base `{report.base.get('name', '')}` was a local folder; put its place into the lines above.")
    return " ".join(notes)


def _made(report: Report) -> str:
    lines = []
    for index, step in enumerate(_steps(report)):
        row = report.rows[index + 1] if index + 1 < len(report.rows) else None
        settings = ", ".join(f"{key} {plain(str(value))}" for key, value in step.items() if key in _SHOWN and value is not None)
        lines.append(f"{index + 1}. `{step['step']}`{f': {settings}' if settings else ''}{_outcome(row)}")
    data = plain(str((report.recipe.get("data") or {}).get("train", "")))
    base = report.base.get("hub_id")
    commit = f"Base: {base} at commit {report.base['revision']}. " if base and report.base.get("revision") else ""
    worst = "".join(f"\n\n`{row.name}`: {plain(text)}" for row in report.rows if (text := row.worst_layers()))
    return "\n".join(lines) + f"{worst}\n\n{commit}Data: {data}. Seed {report.recipe.get('seed', 0)}."


_SHOWN = ("scheme", "double_quant", "keep", "sparsity", "r", "lora_alpha", "learning_rate", "temperature")


def _outcome(row: Row | None) -> str:
    if row is None:
        return ""
    steps = row.details.get("optimizer_steps")
    tokens = row.details.get("trained_tokens")
    trained = f" ({counted(steps, 'optimizer step')}, {counted(tokens, 'trained token')})" if steps and tokens else ""
    return f"{trained}; perplexity then {row.perplexity:.4g}"


def _warning(measured: Report | Evaluation | None) -> str:
    """A collapse is the first thing that a reader of figures is told."""
    text = measured.warning() if measured is not None else ""
    return text and f"**{plain(text)}**"


def _evaluated(evaluation: Evaluation) -> str:
    about = evaluation.about
    table = {"": evaluation.headings(), **evaluation.lines()}
    header, *lines = (f"| {plain(name)} | {' | '.join(map(plain, cells))} |" for name, cells in table.items())
    lines = [header, f"|---|{'---:|' * len(evaluation.models)}", *lines]
    cores = counted(about.get("cores", "?"), "core")
    machine = f"{about.get('cpu', '?')}, {cores}; torch {about.get('torch', '?')}, transformers {about.get('transformers', '?')}"
    how = " ".join(filter(None, (plain(str(about.get("quality_on", ""))), evaluation.speed_on())))
    return "\n".join(lines) + f"\n\n{how} {machine}; {about.get('date', '')}.{evaluation.grid()}"


def _not_measured(report: Report, evaluation: Evaluation | None) -> str:
    this = report.rows[-1] if report.rows else None
    missing = [
        name
        for name, value in (
            ("the KL divergence from the base", this and this.kl),
            ("speed", this and this.decode_tokens_per_second),
            ("peak memory", this and this.peak_memory_bytes),
        )
        if value is None
    ]
    if report.environment.get("device") == "cpu":
        missing.append("anything on a GPU")
    this_one = evaluation.models["this"] if evaluation is not None else {}
    if not this_one.get("tasks"):
        missing.append("benchmark tasks")
    if this_one.get("joules_per_1000_tokens") is None and report.whole_energy() is None:
        missing.append("energy")
    missing += ["texts of another kind than the one above", "safety, bias and factual correctness"]
    return "\n".join(f"- {name}" for name in missing) + "\n\nWhat the base cannot do, this cannot do either; its licence and terms of use hold here too."


def plain(text: str) -> str:
    """Text that cannot break out of a table cell or a paragraph."""
    return re.sub(r"([|`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def fenced(text: str, language: str) -> str:
    """A code block that no line of the text can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
