"""What is pruned equals what is masked, for every family; and what cannot be pruned says so."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmlite.errors import UnsupportedModel
from llmlite.models.rebuild import rebuild
from llmlite.models.size import size_of_config, size_of_model
from llmlite.models.slicing import head_rows, take_ffn_channels, take_hidden, take_kv_groups, take_layers, take_query_heads, with_zero_biases
from llmlite.models.view import ModelView
from tests.conftest import ALL_FAMILIES, FIXED_HEAD_FAMILIES, HEAD_FAMILIES, build_tiny, logits_of, tiny_config, token_ids

KV_KEEP = [[1], [0], [1]]
QUERY_KEEP = [[0, 3], [1, 2], [1, 3]]
FFN_KEEP = [sorted(torch.randperm(128, generator=torch.Generator().manual_seed(layer))[:64].tolist()) for layer in range(3)]
HIDDEN_KEEP = sorted(torch.randperm(64, generator=torch.Generator().manual_seed(9))[:48].tolist())
RMS_FAMILIES = [name for name in HEAD_FAMILIES if name != "phi"]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def pruned(model: PreTrainedModel, sliced: tuple[Any, dict[str, Tensor]]) -> Any:
    fresh = rebuild(model, *sliced)
    assert size_of_model(fresh) == size_of_config(sliced[0])
    return fresh


def zero_columns(model: PreTrainedModel, role: str, gone: Sequence[Sequence[int]]) -> PreTrainedModel:
    """A copy of the model whose projections do not hear some of their inputs: the slow, obvious way to remove a unit."""
    masked = copy.deepcopy(model)
    for block, columns in zip(ModelView(masked).blocks, gone, strict=True):
        block.linears[role].weight_OI[:, list(columns)] = 0
    return masked


def head_columns(heads: Sequence[int], head_dim: int = 16) -> list[int]:
    return [head * head_dim + channel for head in heads for channel in range(head_dim)]


@pytest.mark.parametrize("name", [name for name in HEAD_FAMILIES if name != "olmo2"])
def test_pruned_kv_groups_equal_masked_ones(name: str) -> None:
    model = build_tiny(name)
    gone = [head_columns([head for head in range(4) if head // 2 not in kept]) for kept in KV_KEEP]
    small = pruned(model, take_kv_groups(ModelView(model), KV_KEEP))
    close(logits_of(small), logits_of(zero_columns(model, "o", gone)))
    assert (ModelView(small).heads, ModelView(small).kv_heads, ModelView(small).head_dim) == (2, 1, 16)


@pytest.mark.parametrize("name", [name for name in HEAD_FAMILIES if name != "olmo2"])
def test_pruned_query_heads_equal_masked_ones(name: str) -> None:
    model = build_tiny(name)
    gone = [head_columns([head for head in range(4) if head not in kept]) for kept in QUERY_KEEP]
    small = pruned(model, take_query_heads(ModelView(model), QUERY_KEEP))
    close(logits_of(small), logits_of(zero_columns(model, "o", gone)))
    assert (ModelView(small).heads, ModelView(small).kv_heads) == (2, 2)


def test_query_heads_without_groups_take_their_keys_and_values_with_them() -> None:
    model = build_tiny("phi3", num_key_value_heads=4)
    gone = [head_columns([head for head in range(4) if head not in kept]) for kept in QUERY_KEEP]
    small = pruned(model, take_query_heads(ModelView(model), QUERY_KEEP))
    close(logits_of(small), logits_of(zero_columns(model, "o", gone)))
    assert ModelView(small).kv_heads == 2


@pytest.mark.parametrize("take", ["kv groups", "query heads"])
def test_olmo2_heads_differ_from_masked_only_by_the_statistics_across_heads(take: str) -> None:
    """Its norms average over the heads that are there: scale the pruned weights by sqrt(kept / all) and mask q and k as well, and the two agree."""
    model = build_tiny("olmo2")
    view = ModelView(model)
    kv_keep = KV_KEEP if take == "kv groups" else [[0, 1]] * 3
    q_keep = [[2 * kv + member for kv in kept for member in (0, 1)] for kept in KV_KEEP] if take == "kv groups" else QUERY_KEEP
    small = pruned(model, take_kv_groups(view, KV_KEEP) if take == "kv groups" else take_query_heads(view, QUERY_KEEP))
    plain = zero_columns(model, "o", [head_columns([head for head in range(4) if head not in kept]) for kept in q_keep])
    assert (logits_of(small) - logits_of(plain)).abs().max() > 0.01

    masked = copy.deepcopy(plain)
    for block, q_heads, kv_heads in zip(ModelView(masked).blocks, q_keep, kv_keep, strict=True):
        for role, heads, total in (("q", q_heads, 4), ("k", kv_heads, 2)):
            rows = head_columns([head for head in range(total) if head not in heads])
            block.linears[role].weight_OI[rows] = 0
            block.linears[role].bias.data[rows] = 0
    for block in ModelView(small).blocks:
        block.q_norm.weight.data *= math.sqrt(4 / 2)
        block.k_norm.weight.data *= math.sqrt(2 / len(kv_keep[0]))
    close(logits_of(small), logits_of(masked), 2e-4)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_pruned_ffn_channels_equal_masked_ones(name: str) -> None:
    model = build_tiny(name)
    gone = [[channel for channel in range(128) if channel not in kept] for kept in FFN_KEEP]
    small = pruned(model, take_ffn_channels(ModelView(model), FFN_KEEP))
    close(logits_of(small), logits_of(zero_columns(model, "down", gone)))
    assert ModelView(small).ffn_channels == 64


@pytest.mark.parametrize("keep", [[0, 2], [1]], ids=str)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_removed_layers_equal_skipped_ones(name: str, keep: list[int]) -> None:
    model = build_tiny(name)
    small = pruned(model, take_layers(ModelView(model), keep))
    skipped = copy.deepcopy(model)
    for block in ModelView(skipped).blocks:
        if block.index not in keep:
            block.module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    close(logits_of(small), logits_of(skipped))
    for new, old in enumerate(keep):
        for attribute in family_lists(model):
            assert getattr(small.config, attribute)[new] == getattr(model.config, attribute)[old]


def family_lists(model: PreTrainedModel) -> list[str]:
    return [name for name in ModelView(model).family.per_layer_lists if getattr(model.config, name, None) is not None]


@pytest.mark.parametrize("name", RMS_FAMILIES)
def test_pruned_hidden_width_equals_masked_width(name: str) -> None:
    model = build_tiny(name)
    view = ModelView(model)
    small = pruned(model, take_hidden(view, HIDDEN_KEEP))
    gone = [channel for channel in range(64) if channel not in HIDDEN_KEEP]
    masked = copy.deepcopy(model)
    seen = ModelView(masked)
    seen.embedding.weight.data[:, gone] = 0
    for linear in seen.linears(["o", "down"]):
        linear.weight_OI[gone] = 0
        if linear.bias is not None:
            linear.bias.data[gone] = 0
    close(logits_of(small), logits_of(masked), 2e-4)
    assert ModelView(small).hidden_size == 48


def test_hidden_width_of_a_layernorm_family_runs_but_is_no_identity() -> None:
    model = build_tiny("phi")
    small = pruned(model, take_hidden(ModelView(model), HIDDEN_KEEP))
    assert ModelView(small).hidden_size == 48
    assert logits_of(small).isfinite().all()


TAKE_ALL = {
    "kv groups": lambda view: take_kv_groups(view, [range(view.kv_heads)] * 3),
    "query heads": lambda view: take_query_heads(view, [range(view.heads)] * 3),
    "ffn channels": lambda view: take_ffn_channels(view, [range(view.ffn_channels)] * 3),
    "layers": lambda view: take_layers(view, range(3)),
    "hidden": lambda view: take_hidden(view, range(64)),
}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_keeping_everything_is_the_identity_bit_for_bit(name: str) -> None:
    model = build_tiny(name)
    kept, old = model.state_dict(), {**model.config.to_dict(), "head_dim": 16}
    for take in TAKE_ALL.values():
        config, state = take(ModelView(model))
        assert {**config.to_dict(), "head_dim": 16} == old
        assert kept.keys() - state.keys() == ({"lm_head.weight"} if ModelView(model).tied else set())
        assert all(torch.equal(tensor, kept[key]) for key, tensor in state.items())
    fresh = rebuild(model, config, state)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in fresh.state_dict().items())
    assert torch.equal(logits_of(fresh), logits_of(model))


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_slicing_does_not_touch_the_model(name: str) -> None:
    model = build_tiny(name)
    before, config = {key: tensor.clone() for key, tensor in model.state_dict().items()}, model.config.to_dict()
    view = ModelView(model)
    fresh = rebuild(model, *take_ffn_channels(view, FFN_KEEP))
    for parameter in fresh.parameters():
        parameter.data.fill_(7)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", HEAD_FAMILIES)
def test_a_plan_on_meta_counts_what_the_pruned_model_has(name: str) -> None:
    model = build_tiny(name)
    with torch.device("meta"):
        meta = ModelView(AutoModelForCausalLM.from_config(tiny_config(name)))
    config, shapes = take_kv_groups(meta, KV_KEEP)
    small = rebuild(model, *take_kv_groups(ModelView(model), KV_KEEP))
    assert size_of_config(config) == size_of_model(small)
    assert {key: tensor.shape for key, tensor in shapes.items()} == {key: small.state_dict()[key].shape for key in shapes}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_head_rows_are_the_rows_that_make_a_head(name: str) -> None:
    """A head whose values are zero contributes what a head whose output columns are zero does, wherever its rows stand."""
    model = build_tiny(name)
    group = ModelView(model).heads // ModelView(model).kv_heads
    silent = copy.deepcopy(model)
    view = ModelView(silent)
    rows = head_rows(view, "v", [1])
    linear = view.blocks[1].linears.get("v") or view.blocks[1].linears["qkv"]
    linear.weight_OI[rows] = 0
    if linear.bias is not None:
        linear.bias.data[rows] = 0
    columns = head_columns([group + member for member in range(group)])
    close(logits_of(silent), logits_of(zero_columns(model, "o", [[], columns, []])))


REFUSED = {
    "kv groups": lambda view: take_kv_groups(view, [[0]] * 3),
    "query heads": lambda view: take_query_heads(view, [[0, 2]] * 3),
    "hidden": lambda view: take_hidden(view, range(32)),
}


@pytest.mark.parametrize("take", REFUSED)
@pytest.mark.parametrize("name", FIXED_HEAD_FAMILIES)
def test_families_with_fixed_heads_refuse_and_name_the_alternative(name: str, take: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"cannot shrink {name}: .*Use prune.ffn or prune.layers"):
        REFUSED[take](ModelView(build_tiny(name)))


def test_settings_that_tie_a_layer_to_its_number_or_a_head_to_the_width_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="layer index"):
        take_layers(ModelView(build_tiny("gpt2", scale_attn_by_inverse_layer_idx=True)), [0, 2])
    with pytest.raises(UnsupportedModel, match="qk_layernorm"):
        take_kv_groups(ModelView(build_tiny("phi", qk_layernorm=True)), KV_KEEP)


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda view: take_kv_groups(view, [[0], [1]]), "2 lists, the model has 3 layers"),
        (lambda view: take_kv_groups(view, [[0], [1], [0, 1]]), "one number for all"),
        (lambda view: take_kv_groups(view, [[0], [2], [0]]), "at least one of 2"),
        (lambda view: take_query_heads(view, [[0, 1], [0, 2], [0, 2]]), r"layer 0 keeps \[2, 0\]"),
        (lambda view: take_ffn_channels(view, [[3, 1]] * 3), "ascending"),
        (lambda view: take_layers(view, []), "at least one of 3 layers"),
        (lambda view: take_hidden(view, [0, 0]), "each once"),
    ],
)
def test_lists_that_make_no_stock_model_are_refused(take: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take(ModelView(build_tiny("llama")))


def test_adapters_are_refused() -> None:
    peft = get_peft_model(build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModel, match="Merge or unload"):
        take_layers(ModelView(peft), [0])


@pytest.mark.parametrize(("name", "written"), [("llama", "llama"), ("mistral", "llama"), ("granite", "granite"), ("gpt2", "gpt2"), ("phi", "phi")])
def test_zero_biases_change_nothing_and_can_be_filled(name: str, written: str) -> None:
    model = build_tiny(name, sliding_window=None) if name == "mistral" else build_tiny(name)
    fresh = pruned(model, with_zero_biases(ModelView(model), attention=True, ffn=True))
    assert fresh.config.model_type == written
    assert torch.equal(logits_of(fresh), logits_of(model))
    assert all(linear.bias is not None for linear in ModelView(fresh).linears(["o", "down"]))
    for linear in ModelView(fresh).linears(["down"]):
        linear.bias.data += 1
    assert not torch.equal(logits_of(fresh), logits_of(model))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "mistral", "stablelm"])
def test_where_no_bias_can_be_written_it_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="bias compensation"):
        with_zero_biases(ModelView(build_tiny(name)), ffn=True)


@pytest.mark.parametrize("name", ALL_FAMILIES)
@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = build_tiny(name)
    small = rebuild(model, *take_layers(ModelView(model), [0, 2]))
    small = rebuild(small, *take_ffn_channels(ModelView(small), FFN_KEEP[:2]))
    if name in HEAD_FAMILIES:
        small = rebuild(small, *take_kv_groups(ModelView(small), KV_KEEP[:2]))
    prompt = token_ids(1, 12)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = small.generate(prompt, use_cache=True, **options)
    ids = prompt
    for _ in range(10):
        scores = small(input_ids=ids, use_cache=False).logits[:, -1]
        scores[:, small.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)
