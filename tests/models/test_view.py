from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from llmlite.errors import UnsupportedModel
from llmlite.models.view import ModelView, unwrap
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, tiny_config


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_no_parameter_is_left_unmapped(name: str) -> None:
    assert ModelView(build_tiny(name)).unmapped_parameters() == []


def test_variants_of_a_family_are_mapped_too() -> None:
    variants = [
        build_tiny("phi", qk_layernorm=True),
        build_tiny("stablelm", use_parallel_residual=True),
        build_tiny("gpt_neox", attention_bias=False),
        build_tiny("opt", do_layer_norm_before=False, word_embed_proj_dim=32),
    ]
    assert [ModelView(model).unmapped_parameters() for model in variants] == [[]] * 4


def test_a_parameter_the_table_does_not_know_is_named() -> None:
    model = build_tiny("llama")
    model.model.layers[1].mlp.extra = torch.nn.Parameter(torch.zeros(3))
    model.model.extra = torch.nn.Parameter(torch.zeros(3))
    assert ModelView(model).unmapped_parameters() == ["model.extra", "model.layers.1.mlp.extra"]


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_a_view_of_a_meta_model_reads_the_same_shapes(name: str) -> None:
    with torch.device("meta"):
        meta = ModelView(AutoModelForCausalLM.from_config(tiny_config(name)))
    real = ModelView(build_tiny(name))
    assert meta.tied == real.tied == meta.config.tie_word_embeddings
    assert [(x.name, x.in_features, x.out_features) for x in meta.linears()] == [(x.name, x.in_features, x.out_features) for x in real.linears()]
    for linear in real.linears():
        assert linear.weight_OI.shape == (linear.out_features, linear.in_features)
        assert real.model.get_submodule(linear.name) is linear.module


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_widths_of_the_roles_follow_from_the_config(name: str) -> None:
    view = ModelView(build_tiny(name))
    attention, key_value = view.heads * view.head_dim, view.kv_heads * view.head_dim
    wanted = {
        "q": (attention, view.hidden_size),
        "k": (key_value, view.hidden_size),
        "v": (key_value, view.hidden_size),
        "qkv": (attention + 2 * key_value, view.hidden_size),
        "o": (view.hidden_size, attention),
        "gate": (view.ffn_channels, view.hidden_size),
        "up": (view.ffn_channels, view.hidden_size),
        "gate_up": (2 * view.ffn_channels, view.hidden_size),
        "down": (view.hidden_size, view.ffn_channels),
    }
    for linear in view.linears():
        assert (linear.out_features, linear.in_features) == wanted[linear.role]


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_lora_on_the_projections_hits_every_block_linear_and_nothing_else(name: str) -> None:
    plain = build_tiny(name)
    names = [linear.name for linear in ModelView(plain).linears()]
    dense = logits_of(plain)
    peft = get_peft_model(plain, LoraConfig(r=2, target_modules=names))
    wrapped = [module_name.removeprefix("base_model.model.") for module_name, module in peft.named_modules() if hasattr(module, "lora_A")]
    assert sorted(wrapped) == sorted(names)
    view = ModelView(peft)
    assert view.wrapped
    assert [linear.name for linear in view.linears()] == names
    assert view.unmapped_parameters() == []
    assert all(linear.weight_OI.shape == (linear.out_features, linear.in_features) for linear in view.linears())
    assert torch.equal(logits_of(peft), dense)


class Engine(torch.nn.Module):
    """As DeepSpeed's: the model under `module`, and a `config` of its own."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, {"train_batch_size": 1}


def test_a_model_is_found_under_every_wrapper_in_any_order() -> None:
    model = build_tiny("llama")
    assert unwrap(model) is model
    for wrapped in (Engine(model), torch.compile(model), Engine(torch.compile(model))):
        assert unwrap(wrapped) is model
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for wrapped in (peft, Engine(peft), torch.compile(peft), Engine(torch.compile(peft)), torch.compile(Engine(peft))):
        assert unwrap(wrapped) is model


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_bitsandbytes_model_keeps_its_roles_and_refuses_its_weights(name: str, tmp_path: Path) -> None:
    plain = build_tiny(name)
    plain.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    peft = get_peft_model(quantized, LoraConfig(r=2, target_modules=[linear.name for linear in ModelView(plain).linears()]))
    want = [(linear.name, linear.in_features, linear.out_features) for linear in ModelView(plain).linears()]
    for model in (quantized, peft):
        view = ModelView(model)
        assert view.quantized
        assert [(linear.name, linear.in_features, linear.out_features) for linear in view.linears()] == want
        with pytest.raises(UnsupportedModel, match="before quantizing"):
            _ = view.blocks[0].linears["o"].weight_OI


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="AutoModelForCausalLM"):
        ModelView(AutoModel.from_config(tiny_config("llama")))
