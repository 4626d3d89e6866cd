from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from llmlite.errors import UnsupportedModel
from llmlite.models.legal import as_equivalent, legal_config, round_to_multiple
from llmlite.models.rebuild import rebuild
from llmlite.models.slicing import take_kv_groups
from llmlite.models.view import ModelView
from tests.conftest import ALL_FAMILIES, HEAD_FAMILIES, build_tiny, logits_of, tiny_config
from tests.models.test_slicing import close, head_columns, zero_columns

EIGHT_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
KEEP = [[0, 2, 3], [1, 2, 3], [0, 1, 3]]


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_a_config_that_stock_accepts_stays_what_it_is(name: str) -> None:
    config = tiny_config(name)
    legal, note = legal_config(config)
    assert note == ""
    assert legal is not config
    assert legal.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        ({}, "mistral"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 16}}, "mistral"),
        ({"tie_word_embeddings": True}, "mistral"),
        ({"attention_bias": True}, "smollm3"),
        ({"mlp_bias": True, "tie_word_embeddings": True}, "smollm3"),
    ],
    ids=["plain", "llama3 rope", "tied", "attention bias", "ffn bias"],
)  # fmt: skip
def test_a_llama_whose_heads_do_not_divide_its_width_is_written_as_an_equal_family(overrides: dict[str, Any], written: str, tmp_path: Path) -> None:
    model = build_tiny("llama", **EIGHT_HEADS, **overrides)
    small = rebuild(model, *take_kv_groups(ModelView(model), KEEP))
    assert (small.config.model_type, ModelView(small).heads, ModelView(small).hidden_size) == (written, 6, 64)
    gone = [head_columns([head for head in range(8) if head // 2 not in kept], head_dim=8) for kept in KEEP]
    close(logits_of(small), logits_of(zero_columns(model, "o", gone)))
    small.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == {"mistral": "MistralForCausalLM", "smollm3": "SmolLM3ForCausalLM"}[written]
    assert torch.equal(logits_of(reloaded), logits_of(small))


@pytest.mark.parametrize("target", ["mistral", "smollm3"])
def test_equivalent_families_give_the_same_logits_bit_for_bit(target: str) -> None:
    model = build_tiny("llama")
    config = as_equivalent(model.config, target)
    assert config.model_type == target
    assert torch.equal(logits_of(rebuild(model, config, model.state_dict())), logits_of(model))


def test_what_is_not_equivalent_is_not_offered() -> None:
    assert as_equivalent(tiny_config("mistral", sliding_window=8), "llama") is None
    assert as_equivalent(tiny_config("llama", attention_bias=True), "mistral") is None
    assert as_equivalent(tiny_config("qwen2"), "llama") is None


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_family_without_an_equivalent_is_refused_with_the_nearest_numbers(name: str) -> None:
    model = build_tiny(name, **EIGHT_HEADS)
    with pytest.raises(UnsupportedModel, match="nearest legal numbers of heads are 4 and 8"):
        take_kv_groups(ModelView(model), KEEP)


@pytest.mark.parametrize("name", HEAD_FAMILIES)
def test_the_next_legal_number_of_heads_reloads(name: str, tmp_path: Path) -> None:
    model = build_tiny(name, **EIGHT_HEADS)
    groups = 2 if name in ("gemma2", "gemma3_text") else 3  # of four, with two query heads each
    small = rebuild(model, *take_kv_groups(ModelView(model), [range(groups)] * 3))
    small.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(small))


def test_query_heads_that_key_value_heads_do_not_divide_are_refused() -> None:
    config = tiny_config("qwen3")
    config.num_attention_heads = 3
    with pytest.raises(UnsupportedModel, match="3 query heads are not a multiple of 2"):
        legal_config(config)


@given(st.integers(1, 5000), st.integers(1, 256), st.integers(1, 5000))
def test_rounding_finds_the_nearest_allowed_width(count: int, multiple: int, total: int) -> None:
    rounded = round_to_multiple(count, multiple, total)
    allowed = {total, *range(multiple, total, multiple)}
    assert rounded in allowed
    if count < total:
        distance = abs(rounded - count)
        assert distance <= min(abs(width - count) for width in allowed if width % multiple == 0 or width == rounded)
    else:
        assert rounded == total
