"""What is saved is what was measured, in the type the base was published in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmlite.models.safety import make_safe
from llmlite.models.save import save_model, settle
from llmlite.models.size import expected_bytes
from tests.conftest import build_tiny, logits_of


def dtypes(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_a_settled_model_comes_back_from_its_16_bit_file_with_the_same_logits(model_type: str, tmp_path: Path) -> None:
    model = build_tiny(model_type)
    before = logits_of(model)
    settle(model, torch.bfloat16)
    settled = logits_of(model)
    save_model(model, tmp_path, torch.bfloat16)
    assert not torch.equal(before, settled)
    assert torch.equal(logits_of(model), settled)
    assert set(dtypes(tmp_path).values()) == {"BF16"}
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), settled)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_model_comes_back_with_the_same_logits_at_the_planned_size(tied: bool, tmp_path: Path) -> None:
    build_tiny("llama", tie_word_embeddings=tied, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}).eval()
    make_safe(model)
    before = logits_of(model)
    save_model(model, tmp_path / "small", torch.bfloat16)
    kinds = dtypes(tmp_path / "small")
    assert kinds["model.embed_tokens.weight"] == "F32"  # what it was computed in: stock transformers ignores dtype= when it loads this
    assert ("lm_head.weight" in kinds) == (not tied)
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert size == pytest.approx(expected_bytes(model.config, dtype=torch.float32, scheme="nf4", double_quant=True), rel=0.01)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32, device_map={"": "cpu"}).eval()
    make_safe(back)
    assert torch.allclose(logits_of(back), before, atol=1e-5)
