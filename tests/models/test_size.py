from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from llmlite.errors import LoadError, UnsupportedModel
from llmlite.models.size import Size, count_zeros, expected_bytes, size_of_config, size_of_model
from llmlite.models.view import ModelView
from llmlite.storage import folder_bytes
from tests.conftest import ALL_FAMILIES, build_tiny, tiny_config


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_size_from_the_config_is_the_size_of_the_model(name: str) -> None:
    model = build_tiny(name)
    size = size_of_config(model.config)
    assert size == size_of_model(model)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    norms_and_stem = size.parameters - size.decoder - size.embedding - size.head
    assert norms_and_stem == sum(parameter.numel() for parameter in ModelView(model).final_norm.parameters())
    assert (size.head == 0) == model.config.tie_word_embeddings


def test_a_70b_llama_is_counted_from_its_config() -> None:
    config = tiny_config(
        "llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    per_layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert size_of_config(config) == Size(80 * per_layer + 2 * 128256 * 8192 + 8192, 80 * per_layer, 128256 * 8192, 128256 * 8192)


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in ALL_FAMILIES), ("llama", torch.bfloat16), ("gpt2", torch.float16)])
def test_expected_bytes_are_the_bytes_that_were_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_tiny(name, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert folder_bytes(tmp_path) == expected_bytes(model.config, dtype=dtype)


SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("label", SCHEMES)
@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16), ("phi3", torch.bfloat16)])
def test_expected_bytes_are_those_of_a_saved_bitsandbytes_model(name: str, dtype: torch.dtype, label: str, tmp_path: Path) -> None:
    dense = build_tiny(name, dtype=dtype)
    dense.save_pretrained(tmp_path / "dense")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=BitsAndBytesConfig(**SCHEMES[label]), dtype=dtype)
    assert size_of_model(quantized) == size_of_config(dense.config)
    quantized.save_pretrained(tmp_path / "small")
    scheme, _, double = label.partition(" ")
    expected = expected_bytes(dense.config, dtype=dtype, scheme=scheme, double_quant=bool(double))  # type: ignore[arg-type]
    digits = 4 * len(list(ModelView(dense).linears())) + 64 if double else 0
    assert abs(folder_bytes(tmp_path / "small") - expected) <= digits


def test_bits_per_weight_approach_the_known_figures() -> None:
    config = tiny_config("llama", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=4)
    size = size_of_config(config)
    rest = 4 * (size.parameters - size.decoder)

    def bits(scheme: Any, double_quant: bool = False) -> float:
        return 8 * (expected_bytes(config, scheme=scheme, double_quant=double_quant) - rest) / size.decoder

    assert bits("nf4") == pytest.approx(4.51, abs=0.01)
    assert bits("nf4", True) == pytest.approx(4.14, abs=0.02)
    assert bits("int8") == pytest.approx(8.03, abs=0.03)


def test_adapters_do_not_change_the_size() -> None:
    model = build_tiny("qwen3")
    before = size_of_model(model)
    assert size_of_model(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_zeros_in_the_file_are_the_zeros_of_the_model(name: str, tmp_path: Path) -> None:
    model = build_tiny(name)
    assert count_zeros(model).zeros == 0
    linear = next(ModelView(model).linears(["down"]))
    linear.weight_OI[:16] = 0
    found = count_zeros(model)
    assert found.zeros == 16 * 128
    assert found.by_name[linear.name] == 0.25
    assert found.weights == sum(x.in_features * x.out_features for x in ModelView(model).linears())
    model.save_pretrained(tmp_path)
    assert count_zeros(tmp_path) == found
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    packed = count_zeros(quantized)
    assert packed.by_name[linear.name] >= 0.25
    assert packed.weights == found.weights
    quantized.save_pretrained(tmp_path / "nf4")
    assert count_zeros(tmp_path / "nf4") == packed


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError):
        count_zeros(tmp_path)


def test_size_of_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModel):
        size_of_config(AutoConfig.for_model("mamba", num_hidden_layers=1, hidden_size=32))
