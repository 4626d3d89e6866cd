"""The base of a result: what is known of it.

An adapter is worth nothing without its base, so the base is named by its Hub id, never by a folder, with how it was quantized when the adapter was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llmlite.models.find import Source
    from llmlite.report import Report

__all__ = ["base_of", "describe_base"]


def describe_base(source: Source, config: PretrainedConfig | None, before_adapter: list[str] | None, vocabulary: int | None = None) -> dict[str, Any]:
    """What the card needs to know of the base, to be kept in the report.

    Args:
        source: where the base was found.
        config: the config of the model that an adapter sits on; None when the result is no adapter.
        before_adapter: names of the steps that made that model from the base, bitsandbytes apart; None when the result is no adapter.
        vocabulary: rows that the base's embedding must have for the adapter's added tokens, when it has fewer.

    Returns:
        Plain values: name, hub_id, revision (commit), weights, license and its kin, language; for adapters quantization_config, made_by and vocabulary.
    """
    known: dict[str, Any] = {"name": source.hub_id or Path(source.name).name, "hub_id": source.hub_id}
    if source.hub_id and source.folder.parent.name == "snapshots":
        known["revision"] = source.folder.name
    elif source.hub_id:
        from llmlite.models.gguf import packaged_licence

        known |= {"weights": "a GGUF file from a package", "license": packaged_licence(source.hub_id)}
    known |= _metadata_of(source.folder / "README.md")
    if before_adapter is not None:
        known |= {"made_by": before_adapter, "quantization_config": _bitsandbytes(config), "vocabulary": vocabulary}
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
