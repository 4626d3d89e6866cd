from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmlite.errors import UnsupportedModel
from llmlite.models.rebuild import rebuild
from llmlite.models.slicing import take_ffn_channels, take_hidden, take_kv_groups, take_layers
from llmlite.models.view import ModelView
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, require_stock_reload, token_ids


def prune_everything(model: PreTrainedModel) -> Any:
    """One layer, half of the channels and, where it can be, half of the heads and a quarter of the hidden width gone; other units in each layer."""
    small = rebuild(model, *take_layers(ModelView(model), [1, 2]))
    small = rebuild(small, *take_ffn_channels(ModelView(small), [range(64), range(0, 128, 2)]))
    if not ModelView(model).family.no_heads:
        small = rebuild(small, *take_kv_groups(ModelView(small), [[0], [1]]))
        small = rebuild(small, *take_hidden(ModelView(small), range(0, 48)))
    return small


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in ALL_FAMILIES), *((name, torch.bfloat16) for name in ("llama", "gemma3_text", "phi3", "gpt_neox"))]
)
def test_live_equals_reloaded_by_stock_from_pretrained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small = prune_everything(build_tiny(name, dtype=dtype))
    small.save_pretrained(tmp_path)
    reloaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    assert type(reloaded) is type(small)
    assert torch.equal(logits_of(reloaded), logits_of(small))
    assert small.dtype == reloaded.dtype == dtype
    assert small.config._attn_implementation == reloaded.config._attn_implementation
    ours, theirs = dict(small.named_buffers()), dict(reloaded.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_live_equals_reloaded_in_a_fresh_process(tmp_path: Path) -> None:
    require_stock_reload({name: prune_everything(build_tiny(name)) for name in ALL_FAMILIES}, tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_a_pruned_model_trains_every_parameter(name: str) -> None:
    small = prune_everything(build_tiny(name)).train()
    ids = token_ids()
    small(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for key, parameter in small.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi", "gpt2"])
def test_tied_stays_tied_and_untied_stays_untied(name: str, tied: bool) -> None:
    small = prune_everything(build_tiny(name, tie_word_embeddings=tied))
    assert ModelView(small).tied == tied


def test_generation_config_and_mode_come_along() -> None:
    model = build_tiny("llama").train()
    model.generation_config.temperature = 0.3
    small = rebuild(model, *take_layers(ModelView(model), [0]))
    assert small.generation_config.temperature == 0.3
    assert small.generation_config is not model.generation_config
    assert small.training


def test_tensors_that_do_not_fit_the_config_are_refused() -> None:
    model = build_tiny("llama")
    config, state = take_ffn_channels(ModelView(model), [range(64)] * 3)
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight has shape \(128, 64\), the config wants \(64, 64\).*and 6 more"):
        rebuild(model, config, model.state_dict())
    with pytest.raises(ValueError, match=r"missing .*model.norm.weight"):
        rebuild(model, config, {name: tensor for name, tensor in state.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"left over .*stray"):
        rebuild(model, config, {**state, "stray": torch.zeros(1)})


def test_offloaded_tensors_are_refused() -> None:
    model = build_tiny("llama")
    state = {**model.state_dict(), "model.norm.weight": torch.empty(64, device="meta")}
    with pytest.raises(UnsupportedModel, match="without offloading"):
        rebuild(model, model.config, state)
