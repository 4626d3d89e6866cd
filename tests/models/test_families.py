from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmlite.errors import UnsupportedModel
from llmlite.models.families import FAMILIES, family_of
from tests.conftest import ALL_FAMILIES, build_tiny, tiny_config, token_ids


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_config_names_read_the_sizes_of_the_real_config(name: str) -> None:
    config, family = tiny_config(name), FAMILIES[name]
    heads = (family.heads(config), family.kv_heads(config), family.dim_of_head(config))
    assert heads == (4, 2 if family.num_kv_heads else 4, 16)
    assert (family.width(config), family.layers(config), family.ffn_channels(config)) == (64, 3, 128)
    assert hasattr(config, family.norm_eps) or name == "opt"
    assert {switch for switch in (family.attention_bias, family.ffn_bias) if isinstance(switch, str)} <= set(dir(config))


def test_gpt2_without_inner_width_is_four_times_as_wide() -> None:
    assert FAMILIES["gpt2"].ffn_channels(tiny_config("gpt2", n_inner=None)) == 256


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_bias_switch_turns_the_output_bias_on_and_off(name: str) -> None:
    family = FAMILIES[name]
    for fact, path in ((family.attention_bias, family.o), (family.ffn_bias, family.down)):
        for wanted in (True, False):
            config = tiny_config(name, **({fact: wanted} if isinstance(fact, str) else {}))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            block = model.get_submodule(family.blocks)[0]
            assert (block.get_submodule(path).bias is not None) == (wanted if isinstance(fact, str) else fact)


@pytest.mark.parametrize("name", ALL_FAMILIES)
@torch.no_grad()
def test_packing_by_position_is_as_the_table_says(name: str) -> None:
    model = build_tiny(name)
    first, second = token_ids(1, 9, seed=1), token_ids(1, 7, seed=2)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], 1)
    difference = (packed - alone).abs().max().item()
    assert difference < 1e-4 if FAMILIES[name].packs_by_position else difference > 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AutoConfig.for_model("mixtral"), ("mixture of experts", "mistral", "LoRA with explicit target_modules")),
        (AutoConfig.for_model("qwen3_moe"), ("mixture of experts", "qwen3")),
        (AutoConfig.for_model("t5"), ("encoder-decoder", "Quantization")),
        (AutoConfig.for_model("gemma3"), ("multimodal", "gemma3_text")),
        (AutoConfig.for_model("mamba"), ("not in the table", "Quantization")),
        (tiny_config("llama", per_layer_config={0: {"intermediate_size": 64}}), ("per_layer_config", "different widths")),
        (tiny_config("gpt2", add_cross_attention=True), ("encoder-decoder",)),
    ],
)
def test_what_is_not_mapped_is_refused_with_a_way_out(config: object, words: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        family_of(config)
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_the_table_needs_no_torch() -> None:
    code = "import sys, llmlite.models.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
