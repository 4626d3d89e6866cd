"""Bottleneck adapters behave like peft's own: nothing at first, saved and loaded, several side by side, on and off, on dense and quantized bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import llmlite
from llmlite.adapters.bottleneck import Bottleneck
from llmlite.errors import ConfigError
from llmlite.models.adapted import adapter_parameters
from llmlite.models.safety import make_safe
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, tiny_config
from tests.snippets import snippet

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def filled(model: Any, seed: int = 1) -> Any:
    """The adapter with random numbers in it, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: PreTrainedModel, placement: str, **options: Any) -> Any:
    step = Bottleneck(placement=placement, bottleneck_size=8, **options)
    return peft.get_peft_model(model, step.peft_config(model.config)).eval()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_untrained_adapter_is_the_base_and_a_filled_one_comes_back_from_its_folder(family: str, placement: str, tmp_path: Path) -> None:
    if family == "opt" and placement == "parallel":
        with pytest.raises(ConfigError, match="needs an FFN module"):
            Bottleneck(placement="parallel").places(tiny_config("opt"))
        return
    base = build_tiny(family)
    before = logits_of(base)
    model = adapted(base, placement)
    assert torch.equal(logits_of(model), before)
    assert adapter_parameters(model) == Bottleneck(placement=placement, bottleneck_size=8).added_parameters(base.config)[0]
    expected = logits_of(filled(model))
    assert not torch.allclose(expected, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = llmlite.load_adapter(build_tiny(family), tmp_path)
    assert torch.equal(logits_of(again), expected)
    assert torch.equal(logits_of(again.unload()), before)


def test_houlsby_is_the_formula_after_both_sublayers() -> None:
    model = filled(adapted(build_tiny("llama"), "houlsby", activation="gelu", scaling=0.5))
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    x_BTD = torch.randn(2, 5, 64)
    base_BTD = layer.base_layer(x_BTD)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    by_hand = base_BTD + 0.5 * (nn.functional.gelu(base_BTD @ down.weight.t() + down.bias) @ up.weight.t() + up.bias)
    torch.testing.assert_close(layer(x_BTD), by_hand)


def test_parallel_reads_the_input_of_the_ffn() -> None:
    model = filled(adapted(build_tiny("llama"), "parallel"))
    layer = model.base_model.model.model.layers[0].mlp
    x_BTD = torch.randn(2, 5, 64)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    by_hand = layer.base_layer(x_BTD) + 4.0 * (torch.relu(x_BTD @ down.weight.t() + down.bias) @ up.weight.t() + up.bias)
    torch.testing.assert_close(layer(x_BTD), by_hand)


def test_several_lie_side_by_side_and_are_switched_on_and_off(tmp_path: Path) -> None:
    logits: dict[str, Tensor] = {}
    for name, seed in (("one", 1), ("two", 2)):
        model = filled(adapted(build_tiny("llama"), "pfeiffer"), seed)
        logits[name] = logits_of(model)
        model.save_pretrained(tmp_path / name)
    base = build_tiny("llama")
    before = logits_of(base)
    model = llmlite.load_adapter(base, tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    assert torch.equal(logits_of(model), logits["one"])
    model.set_adapter("two")
    assert torch.equal(logits_of(model), logits["two"])
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(logits_of(llmlite.load_adapter(build_tiny("llama"), tmp_path / "both" / "one")), logits["one"])


def test_the_lines_of_the_documentation_load_two_of_them_and_switch(model_folder: Path, tmp_path: Path) -> None:
    names: dict[str, str | Path] = {"HuggingFaceTB/SmolLM2-135M-Instruct": model_folder}
    for name, seed in (("outputs/bottleneck_adapter", 1), ("outputs/another", 2)):
        model = filled(adapted(AutoModelForCausalLM.from_pretrained(model_folder), "pfeiffer"), seed)
        model.save_pretrained(tmp_path / name)
        names[name] = tmp_path / name
    found: dict[str, Any] = {}
    exec(snippet("docs/adapters.md", "llmlite.load_adapter", names), found)
    assert torch.equal(logits_of(found["model"].eval()), logits_of(model))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_only_the_adapter_of_a_quantized_base_learns(scheme: str, tmp_path: Path) -> None:
    build_tiny("llama").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True) if scheme == "int8" else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}).eval()
    make_safe(base)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = filled(adapted(base, "houlsby"))
    model.train()
    model(input_ids=torch.arange(3, 19)[None], labels=torch.arange(3, 19)[None]).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert all(torch.equal(parameter, before[name.replace(".base_layer", "")]) for name, parameter in base.named_parameters() if "bottleneck" not in name)


def test_merging_is_refused_early_and_in_the_layer(pairs_file: Path, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonlinearity"):
        adapted(build_tiny("llama"), "pfeiffer").merge_and_unload()
    options = {"model": str(model_folder), "data": str(pairs_file), "output_dir": str(tmp_path / "out"), "max_length": 64}
    with pytest.raises(ConfigError, match="merge: what bottleneck learns"):
        llmlite.Recipe(steps=[Bottleneck(merge=True)], **options).check()
    with pytest.raises(ConfigError, match="what bottleneck learns is no change of weights"):
        llmlite.Recipe(steps=[Bottleneck(), llmlite.Merge()], **options).check()
    with pytest.raises(ConfigError, match="what bottleneck learns is no change of weights"):
        llmlite.Recipe(steps=[llmlite.DistillWhiteBox(adapter=Bottleneck(), teacher=str(model_folder)), llmlite.Merge()], **options).check()


def test_an_adapter_that_cannot_be_merged_may_come_behind_the_merge_of_another(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    steps = [llmlite.Ia3(max_steps=1), llmlite.Merge(), Bottleneck(max_steps=1)]
    plan = llmlite.Recipe(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), max_length=64, steps=steps).check()
    assert [row["step"] for row in plan.rows][1:] == ["ia3", "merge", "bottleneck"]
