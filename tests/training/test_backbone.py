"""A model in two halves gives the logits of the whole."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmlite.errors import UnsupportedModel
from llmlite.training.backbone import hidden_and_head, logit_transform, require_known_logits
from tests.training.cross_entropy import chunked_cross_entropy

SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
# pad_token_id: some defaults lie outside of so small a vocabulary
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 8},
    "phi": SMALL,
    "phi3": {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0},
    "stablelm": {**SMALL, "num_key_value_heads": 1},
    "gpt2": {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "opt": {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 12, "pad_token_id": 1},
    "gpt_neox": SMALL,
    "smollm3": {**GROUPED, "pad_token_id": 0},
    "granite": {**GROUPED, "logits_scaling": 6.0},
    "olmo2": GROUPED,
    "cohere": {**GROUPED, "logit_scale": 0.25, "pad_token_id": 0},
    "hyperclovax": {**GROUPED, "logits_scaling": 6.0},
    "recurrent_gemma": {**SMALL, "num_hidden_layers": 3, "logits_soft_cap": 3.0},  # the third is the first with attention
}


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32)
    for parameter in model.parameters():  # zero biases would hide one that was forgotten
        nn.init.normal_(parameter, std=0.3)
    return model


def batch() -> dict[str, Tensor]:
    ids_BT = torch.randint(2, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 5:] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformed_head_of_hidden_equals_logits(family):
    model = tiny(family).eval()
    hidden_BTD, head, transform = hidden_and_head(model, batch())
    expected_BTV = model(**batch()).logits
    torch.testing.assert_close(transform(head(hidden_BTD)), expected_BTV, rtol=1e-5, atol=1e-5)
    require_known_logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_loss_and_gradients_equal_the_models_own(family):
    labels_BT = batch()["input_ids"].masked_fill(batch()["attention_mask"] == 0, -100)
    model = tiny(family).eval()
    whole = model(**batch(), labels=labels_BT).loss
    whole.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    hidden_BTD, head, transform = hidden_and_head(model, {**batch(), "labels": labels_BT})
    loss = chunked_cross_entropy(hidden_BTD, head, labels_BT, transform=transform, chunk_tokens=3)
    loss.backward()
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda message, name=name: f"{name}: {message}")


def test_softcap_and_scale_are_read_from_the_config():
    assert logit_transform(tiny("gemma2").config).softcap == 3.0
    assert logit_transform(tiny("granite").config).scale == pytest.approx(1 / 6)
    assert logit_transform(tiny("cohere").config).scale == 0.25


@pytest.mark.parametrize("target_modules", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora_students_get_the_gradients_of_full_logits(target_modules):
    config = LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False)
    model = get_peft_model(tiny("phi"), config)
    labels_BT = batch()["input_ids"]
    model(**batch(), labels=labels_BT).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    hidden_BTD, head, transform = hidden_and_head(model, batch())
    chunked_cross_entropy(hidden_BTD, head, labels_BT, transform=transform, chunk_tokens=4).backward()
    assert any("lm_head" in name for name in expected) == ("lm_head" in target_modules)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_the_head_sees_one_position_only_and_keeps_no_hook():
    model = tiny("llama")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    hidden_BTD = hidden_and_head(model, batch()).hidden
    assert seen == [(2, 1, 61)]
    assert hidden_BTD.shape == (2, 7, 16)
    handle.remove()
    assert not model.lm_head._forward_pre_hooks


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused():
    model = tiny("llama")
    original = model.forward

    def shifted(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output

    model.forward = shifted
    with pytest.raises(UnsupportedModel, match="llama changes its logits in a way not known here"):
        require_known_logits(model)


def test_probing_changes_neither_modes_nor_random_state():
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.5, init_lora_weights=False)).train()
    model.base_model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    require_known_logits(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UnsupportedModel, match="no LM head"):
        hidden_and_head(tiny("llama").model, batch())
    with pytest.raises(UnsupportedModel, match="no LM head"):
        require_known_logits(tiny("llama").model)
