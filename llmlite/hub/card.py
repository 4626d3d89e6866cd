"""The model card, `README.md`: written from the run's own report, so that no figure in it was typed by hand.

Metadata as the Hub validates it (Mitchell et al. 2019, arXiv:1810.03993, for what a card should tell), the base against the result, the
lines that load it, how it was made with the whole recipe, and what was not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlite.config import to_yaml
from llmlite.hub.public import places_of, public_json, secrets_of_this_machine
from llmlite.report import Report, Row, human_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llmlite.models.load import Source

__all__ = ["base_of", "describe_base", "is_ours", "loading_snippet", "model_card", "private_places", "public_recipe", "public_report", "write_card"]

# settings of the run that say where, not what
_NOT_PUBLISHED = frozenset({"dry_run", "overwrite_output_dir", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision"})


def describe_base(source: Source, config: PretrainedConfig | None, before_adapter: list[str] | None) -> dict[str, Any]:
    """What the card needs to know of the base, to be kept in the report.

    Args:
        source: where the base was found.
        config: the config of the model that an adapter sits on; None when the result is no adapter.
        before_adapter: names of the steps that made that model from the base, bitsandbytes apart; None when the result is no adapter.

    Returns:
        Plain values: name, hub_id, revision (commit), weights, license and its kin, language; for adapters quantization_config and made_by.
    """
    known: dict[str, Any] = {"name": source.hub_id or Path(source.name).name, "hub_id": source.hub_id}
    if source.hub_id and source.folder.parent.name == "snapshots":
        known["revision"] = source.folder.name
    elif source.hub_id:
        from llmlite.models.load import packaged_licence

        known |= {"weights": "a GGUF file from a package", "license": packaged_licence(source.hub_id)}
    known |= _metadata_of(source.folder / "README.md")
    if before_adapter is not None:
        known |= {"made_by": before_adapter, "quantization_config": _bitsandbytes(config)}
    return {key: value for key, value in known.items() if value not in (None, "", [])}


def _metadata_of(readme: Path) -> dict[str, Any]:
    """Licence and language that the base's own card declares."""
    from huggingface_hub import ModelCard

    try:
        data = dict(ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.__dict__)
    except (OSError, ValueError, TypeError):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link", "language") if isinstance(data.get(key), str | list)}


def _bitsandbytes(config: Any) -> dict[str, Any] | None:
    """The arguments of `BitsAndBytesConfig` that give the base the adapter was trained on."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    wanted: tuple[str, ...]
    if values.get("load_in_8bit"):
        wanted = ("load_in_8bit", "llm_int8_threshold", "llm_int8_skip_modules")
    else:
        wanted = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_skip_modules")
    return {name: values[name] for name in wanted if values.get(name) is not None}


def base_of(report: Report | None, base_model: str | None = None) -> str | None:
    """The Hub id of the base, for metadata and adapters; never a path."""
    return base_model or ((report.base.get("hub_id") or None) if report is not None else None)


# Parts --------------------------------------------------------------------------------------------------------------------------------


def loading_snippet(place: str, base: Mapping[str, Any] | None, base_model: str | None = None, revision: str | None = None) -> str:
    """The Python lines that load a result from the Hub with stock libraries.

    Args:
        place: repository, or folder.
        base: what `describe_base` found, for an adapter; None for a whole model.
        base_model: Hub id of an adapter's base, when it is not the one in `base`.
        revision: branch or commit.
    """
    at = f", revision={_literal(revision)}" if revision else ""
    place = _literal(place)
    if base is None:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({place}{at}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({place}{at})"
        )
    quantization = base.get("quantization_config")
    lines = [
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if quantization else ''}",
        "from peft import PeftModel",
        "",
    ]
    if quantization:
        lines.append(
            f"quantization_config = BitsAndBytesConfig({', '.join(f'{name}={_literal(value)}' for name, value in quantization.items() if name.isidentifier())})"
        )
    name = _literal(base_model or base.get("hub_id") or base.get("name"))
    options = ", quantization_config=quantization_config" if quantization else ""
    lines += [
        f'base = AutoModelForCausalLM.from_pretrained({name}, dtype="auto"{options})',
        f"model = PeftModel.from_pretrained(base, {place}{at})",
        f"tokenizer = AutoTokenizer.from_pretrained({place}{at})",
    ]
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """A Python literal; quoted, so that no name can end the string that it stands in."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def public_recipe(report: Report) -> str:
    """The recipe as YAML, without folders of this machine; what `recipe.yaml` on the Hub and the card hold."""
    return to_yaml(_recipe(report))


def public_report(report: Report, place: str, is_adapter: bool, base_model: str | None = None) -> dict[str, Any]:
    """The report's values as they may be read by anybody: folders cut, no quotation of private data, the lines that load it from the Hub."""
    values = report.to_json()
    if not _is_public_data(report):
        for row in values["rows"]:
            row["details"].pop("sample", None)  # rows of somebody's own file: nobody asked to publish them
    values["loading"] = loading_snippet(place, report.base if is_adapter else None, base_model)
    # the lines name the repository and no folder; cutting them would break a name like owner/data.json
    ready = {"loading": values["loading"], "recipe": _recipe(report)}
    return {key: ready[key] if key in ready else _public(value, report) for key, value in values.items()}


def _recipe(report: Report) -> dict[str, Any]:
    """The recipe without its places; a local model or file is named by its last part."""
    recipe: dict[str, Any] = _public({key: value for key, value in report.recipe.items() if key not in _NOT_PUBLISHED}, report)
    if isinstance(recipe.get("model"), dict) and report.base.get("name"):
        recipe["model"]["name"] = report.base.get("hub_id") or report.base["name"]
    for key, value in (report.recipe.get("data") or {}).items():
        if isinstance(value, str) and "/" in value and Path(value).expanduser().exists():
            recipe["data"][key] = Path(value).name
    return recipe


def _public(value: Any, report: Report) -> Any:
    return public_json(value, secrets_of_this_machine(), private_places(report))


def private_places(report: Report) -> tuple[str, ...]:
    """Folders that a run knows: its own, the model's, the data's."""
    model, data = report.recipe.get("model") or {}, report.recipe.get("data") or {}
    named = [model.get("name"), *(data.get(key) for key in ("train", "evaluation", "calibration"))]
    return places_of(report.path, report.recipe.get("output_dir"), *(name for name in named if name and str(name).startswith(("/", "~", "."))))


# The card -----------------------------------------------------------------------------------------------------------------------------


def model_card(report: Report | None, folder: Path, repo_id: str | None = None, base_model: str | None = None) -> str:
    """The whole card.

    Args:
        report: of the run; None for a folder that llmlite did not make.
        folder: the result.
        repo_id: where it will be; None names the folder.
        base_model: Hub id of the base, when the run did not know it.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    place = repo_id or folder.absolute().name
    title = place.rpartition("/")[2]
    snippet = loading_snippet(place, _adapter_base(report, folder) if is_adapter else None, base_model)
    parts = [_metadata(report, folder, title, is_adapter, base_model), f"# {title}", _sentence(report, is_adapter, base_model)]
    if report is not None and report.rows:
        parts += ["## The base against this", _table(report), _conditions(report)]
    parts += ["## Load it", f"```python\n{snippet}\n```", _loading_note(report, is_adapter, base_model)]
    if report is not None:
        parts += [
            "## How it was made",
            _made(report),
            "The whole recipe:",
            _fenced(public_recipe(report), "yaml"),
            "## What was not measured",
            _not_measured(report),
        ]
    return "\n\n".join(part for part in [*parts, _LAST_LINE] if part) + "\n"


def write_card(report: Report) -> Path:
    """Write the card of a finished run into its folder, unless somebody has written another one there. Returns its place."""
    file = report.path / "README.md"
    text = model_card(report, report.path)
    if not file.exists() or is_ours(file.read_text(encoding="utf-8")):
        file.write_text(text, encoding="utf-8")
    return file


def is_ours(card: str) -> bool:
    """Whether a card is as `model_card` wrote it, to be written anew freely; a person's edit takes the last line out or stays ours to keep."""
    return card.rstrip().endswith(_LAST_LINE)


_LAST_LINE = "<!-- Written by llmlite from report.json. Remove this line to keep your own changes when the card is written again. -->"


def _adapter_base(report: Report | None, folder: Path) -> dict[str, Any]:
    if report is not None:
        return report.base
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {"name": str(config.get("base_model_name_or_path") or "BASE")}


def _metadata(report: Report | None, folder: Path, title: str, is_adapter: bool, base_model: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base = base_of(report, base_model)
    known = report.base if report is not None else {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
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
    trained_on = _hub_dataset(report)
    if trained_on and any("learning_rate" in step for step in steps):
        data["datasets"] = [trained_on]
    if report is not None and report.rows:
        text = str(_public(report.evaluation.get("text", "held-out text"), report))
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


def _hub_dataset(report: Report | None) -> str | None:
    """The data set on the Hub that the run read, or None for files and the built-in text."""
    name = str((report.recipe.get("data") or {}).get("train") or "") if report is not None else ""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not Path(name).suffix and not Path(name).exists()
    return name if is_id else None


def _is_public_data(report: Report) -> bool:
    data = report.recipe.get("data") or {}
    return data.get("evaluation") is None and (str(data.get("train", "")).startswith("builtin:") or _hub_dataset(report) is not None)


def _sentence(report: Report | None, is_adapter: bool, base_model: str | None) -> str:
    base = base_of(report, base_model)
    named = f"[{base}](https://huggingface.co/{base})" if base else (report.base.get("name") if report is not None else None)
    of = f" of {named}" if named else ""
    if is_adapter:
        quantization = report.base.get("quantization_config", {}) if report is not None else {}
        bits = " in 8 bit" if quantization.get("load_in_8bit") else " in 4 bit" if quantization.get("load_in_4bit") else ""
        trained = f", trained on that model{bits}" if bits else ""
        sentence = f"An adapter for {named or 'a base model'}{trained}. It is loaded on top of the base and holds none of its weights."
    else:
        steps = [str(step["step"]) for step in _steps(report)]
        sentence = f"A smaller or finetuned version{of}{', made by ' + ', then '.join(steps) if steps else ''}. It loads with unmodified transformers."
    if report is not None and report.base.get("weights"):
        sentence += f" The base's weights came from {report.base['weights']} and differ by their rounding from those in the repository."
    return sentence


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
    add("peak memory of making and loading it", base.peak_memory_bytes, this.peak_memory_bytes, human_bytes)
    return "\n".join(["| | base | this | change |", "|---|---:|---:|---:|", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _conditions(report: Report) -> str:
    about, text = report.environment, report.evaluation
    versions = ", ".join(f"{name} {about[name]}" for name in ("llmlite", "torch", "transformers", "peft", "bitsandbytes") if about.get(name))
    source = _plain(str(_public(text.get("text", "held-out text"), report)))
    machine = f"{about.get('device', '?')} ({about.get('cpu', '?')}, {about.get('cores', '?')} cores)"
    return (
        f"Perplexity, KL and agreement on {text.get('tokens', '?')} tokens ({text.get('examples', '?')} examples) of {source}. "
        f"Speed and memory on {machine}, batch 1. {versions}. {about.get('date', '')}."
    )


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
        settings = ", ".join(f"{key} {_plain(str(_public(value, report)))}" for key, value in step.items() if key in _SHOWN and value is not None)
        lines.append(f"{index + 1}. `{step['step']}`{f': {settings}' if settings else ''}{_outcome(row)}")
    data = _plain(str(_public((report.recipe.get("data") or {}).get("train", ""), report)))
    return "\n".join(lines) + f"\n\nData: {data}. Seed {report.recipe.get('seed', 0)}."


_SHOWN = ("scheme", "double_quant", "keep", "sparsity", "r", "lora_alpha", "learning_rate", "temperature")


def _outcome(row: Row | None) -> str:
    if row is None:
        return ""
    steps = row.details.get("optimizer_steps")
    trained = f" ({steps} optimizer steps, {row.details['trained_tokens']:,} trained tokens)" if steps and row.details.get("trained_tokens") else ""
    return f"{trained}; perplexity then {row.perplexity:.4g}"


def _not_measured(report: Report) -> str:
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
    missing += ["benchmark tasks", "energy", "texts of another kind than the one above", "safety, bias and factual correctness"]
    return "\n".join(f"- {name}" for name in missing) + "\n\nWhat the base cannot do, this cannot do either; its licence and terms of use hold here too."


def _plain(text: str) -> str:
    """Text that cannot break out of a table cell or a paragraph."""
    return re.sub(r"([|`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
