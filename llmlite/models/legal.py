"""Configs that stock transformers accepts: checked early, and written as an equivalent family where their own refuses.

`LlamaConfig` demands that the heads divide the hidden size even when `head_dim` is given; setting the attribute passes, and `save_pretrained` raises
after hours of work. Mistral computes the same function from the same tensors and has no such rule.
"""

from __future__ import annotations

import copy
from typing import Any

from llmlite.errors import UnsupportedModel, counted
from llmlite.models.families import FAMILIES, family_of

__all__ = ["as_equivalent", "legal_config", "round_to_multiple", "with_bias_switches"]

_SHARED = (  # what Llama, Mistral and SmolLM3 mean alike
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "dtype",
)


def legal_config(config: Any) -> tuple[Any, str]:
    """A config that stock code constructs, saves and reloads, and that gives exactly the logits of the one given.

    Args:
        config: of a family in the table; its numbers may have been set after construction, when nothing checks them.

    Returns:
        (config, note). The note is "" when the config was fine as it is (then a copy of it is returned), else one sentence for the report.

    Raises:
        UnsupportedModel: no equivalent accepts it; the message has the nearest legal numbers.
    """
    problem = _refusal(config)
    if not problem:
        return copy.deepcopy(config), ""
    family = family_of(config)
    for name in family.equivalents:
        candidate = as_equivalent(config, name)
        if candidate is not None and not _refusal(candidate):
            note = f"Written as a {name} config, whose logits are equal: {family.model_type} refuses it in stock transformers ({problem})."
            return candidate, note
    raise UnsupportedModel(f"stock transformers refuses this {family.model_type} config: {problem}. {_nearest_heads(config)}")


def as_equivalent(config: Any, model_type: str) -> Any | None:
    """The same function as a config of another model type, or None where the two would differ.

    Tensors keep their names and values. Known: from llama and mistral (without a sliding window) to llama, mistral (without biases) and smollm3.
    """
    if model_type not in family_of(config).equivalents or getattr(config, "sliding_window", None) is not None:
        return None
    biases = {name: bool(getattr(config, name, False)) for name in ("attention_bias", "mlp_bias")}
    per_type: dict[str, dict[str, Any]] = {
        "llama": biases,
        "mistral": {"sliding_window": None},
        "smollm3": {**biases, "no_rope_layers": [1] * config.num_hidden_layers, "use_sliding_window": False, "sliding_window": None},
    }
    if model_type == "mistral" and any(biases.values()):
        return None
    from transformers import CONFIG_MAPPING

    values = {name: copy.deepcopy(getattr(config, name)) for name in _SHARED if hasattr(config, name)}
    try:
        equivalent = CONFIG_MAPPING[model_type](**values, **per_type[model_type])
    except Exception as error:
        if _is_validation(error):
            return None
        raise
    equivalent._attn_implementation = config._attn_implementation
    return equivalent


def with_bias_switches(config: Any, *, attention: bool = False, ffn: bool = False) -> tuple[Any, str]:
    """A config in which the output projections (o, down) carry a bias, so that bias compensation can be written down.

    Switches that turn on biases of other projections as well (Llama's `attention_bias`, `mlp_bias`) are turned on all the same; zeros there change nothing.

    Returns:
        (config, note) as `legal_config` does.

    Raises:
        UnsupportedModel: neither the family nor an equivalent has such a bias.
    """
    family = family_of(config)
    for candidate in (config, *(as_equivalent(config, name) for name in family.equivalents)):
        if candidate is None:
            continue
        facts = FAMILIES[candidate.model_type]
        wanted = [fact for fact, on in ((facts.attention_bias, attention), (facts.ffn_bias, ffn)) if on]
        if False in wanted:
            continue
        changed = copy.deepcopy(candidate)
        for fact in wanted:
            if isinstance(fact, str):
                setattr(changed, fact, True)
        legal, note = legal_config(changed)
        if not note and legal.model_type != config.model_type:
            note = f"Written as a {legal.model_type} config, whose logits are equal: {config.model_type} has no bias there."
        return legal, note
    where = " and ".join(name for name, on in (("attention output", attention), ("FFN output", ffn)) if on)
    raise UnsupportedModel(
        f"a stock {family.model_type} checkpoint has no bias at the {where}, so bias compensation cannot be written. Choose a score without it."
    )


def round_to_multiple(count: int, multiple: int, total: int) -> int:
    """The width nearest to `count` that is a multiple of `multiple`, at least one multiple, at most `total`.

    `total` itself is always allowed, so that "keep everything" keeps everything; a total below one multiple stays as it is. Ties go up.
    """
    if count >= total or multiple >= total:
        return total
    rounded = max(multiple, (2 * count + multiple) // (2 * multiple) * multiple)
    return rounded if rounded <= total else total


def _with_heads(config: Any, heads: int, group: int) -> Any:
    family, changed = family_of(config), copy.deepcopy(config)
    if family.head_dim:
        setattr(changed, family.head_dim, family.dim_of_head(config))
    setattr(changed, family.num_heads, heads)
    if family.num_kv_heads:
        setattr(changed, family.num_kv_heads, heads // group)
    return changed


def _refusal(config: Any) -> str:
    """Why stock code would not reload a config, or ""."""
    family = family_of(config)
    if family.heads(config) % family.kv_heads(config):
        return f"{counted(family.heads(config), 'query head is', 'query heads are')} not a multiple of {counted(family.kv_heads(config), 'key/value head')}"
    try:
        type(config).from_dict(copy.deepcopy(config.to_dict()))
    except Exception as error:
        if not _is_validation(error):
            raise
        return " ".join(str(error).split()).removeprefix("Class validation error for validator 'validate_architecture': ValueError: ").rstrip(".")
    return ""


def _is_validation(error: Exception) -> bool:
    """True for what config classes raise about their own numbers, in every transformers 5."""
    return isinstance(error, ValueError) or type(error).__module__.startswith("huggingface_hub")


def _nearest_heads(config: Any) -> str:
    family = family_of(config)
    heads, kv_heads = family.heads(config), family.kv_heads(config)
    group = heads // kv_heads if heads % kv_heads == 0 else 1
    counts = [count for count in range(group, 2 * heads + 1, group) if not _refusal(_with_heads(config, count, group))]
    nearest = [str(count) for count in [*[c for c in counts if c < heads][-1:], *[c for c in counts if c > heads][:1]]]
    shape = f"{counted(heads, 'head')} of {family.dim_of_head(config)}, hidden size {family.width(config)}"
    return f"({shape}.) The nearest legal numbers of heads are {' and '.join(nearest)}." if nearest else f"({shape}.) Keep all heads."
