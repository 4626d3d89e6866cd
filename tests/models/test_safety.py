"""The traps of bitsandbytes on CPUs: what goes wrong without `make_safe`, and that nothing does with it.

On CPUs with AVX512-BF16 layers pack themselves; elsewhere the tests switch the same code on by the layers' own flag.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from llmlite.cli import QUIET, log_plainly
from llmlite.errors import RunError
from llmlite.models import safety
from llmlite.models.safety import linear_4bit_layers, make_safe, packed_generation
from tests.conftest import build_tiny, logits_of


def quantized(folder: Path, scheme: str = "nf4", double_quant: bool = False, **overrides: Any) -> PreTrainedModel:
    """A tiny model loaded by stock transformers in 4 or 8 bits, as a CPU with AVX512-BF16 would have it."""
    if not (folder / "config.json").is_file():
        build_tiny("llama", **overrides).save_pretrained(folder)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if scheme == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=scheme, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=torch.float32)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}).eval()
    for layer in linear_4bit_layers(model):
        layer.support_avx512bf16_for_cpu = True
    return model


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    make_safe(again)
    return again


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def test_unsafe_an_evaluation_changes_what_is_saved(tmp_path: Path) -> None:
    model = quantized(tmp_path / "dense")
    before = state_of(model)
    logits_of(model)
    after = state_of(model)
    scales = "model.layers.0.mlp.up_proj.weight.absmax"
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert after[scales].dtype == torch.bfloat16
    assert after[scales].shape != before[scales].shape


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_safe_evaluate_then_save_then_reload_is_the_same_model(tmp_path: Path, scheme: str, double_quant: bool) -> None:
    model = quantized(tmp_path / "dense", scheme, double_quant)
    before = state_of(model)
    assert make_safe(model) == 21
    logits = logits_of(model)
    assert same(state_of(model), before)
    assert torch.equal(logits_of(reloaded(model, tmp_path / "saved")), logits)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    scales = [tensor for name, tensor in stored.items() if name.endswith("weight.absmax")]
    assert len(scales) == 21
    assert all(tensor.ndim == 1 and tensor.dtype == (torch.uint8 if double_quant else torch.float32) for tensor in scales)
    assert all(tensor.shape[1] == 1 for name, tensor in stored.items() if name.endswith("proj.weight"))  # packed for the CPU they would be (O, I / 2)


def _gradients(model: PreTrainedModel) -> list[Tensor]:
    """Gradients of a loss with respect to what comes out of the token table."""
    model.train()
    hidden = model.get_input_embeddings()(torch.arange(3, 19)[None]).detach().requires_grad_()
    model(inputs_embeds=hidden, use_cache=False).logits.square().mean().backward()
    model.eval()
    assert hidden.grad is not None
    return [hidden.grad]


def test_unsafe_an_evaluation_takes_the_gradient_away_or_makes_it_a_wrong_one() -> None:
    layer = _layer(32, 64)
    weight_OI = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    layer(torch.randn(2, 64))
    x_NI = torch.randn(2, 64, requires_grad=True)
    out_NO = layer.train()(x_NI)
    if out_NO.requires_grad:
        out_NO.sum().backward()
    # with AVX512-BF16 the input gets no gradient at all; without it a general kernel takes the packed bytes for plain ones
    gradient_NI = torch.zeros(2, 64) if x_NI.grad is None else x_NI.grad
    assert (gradient_NI - weight_OI.sum(0)).norm() > 0.5 * weight_OI.sum(0).norm()


def test_safe_evaluate_then_train_has_the_gradients_of_training_alone(tmp_path: Path) -> None:
    model = quantized(tmp_path / "dense")
    make_safe(model)
    before = _gradients(model)
    logits_of(model)
    after = _gradients(model)
    assert before[0].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _layer(outputs: int, inputs: int) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight = bnb.nn.Params4bit(torch.randn(outputs, inputs), requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer)
    layer = layer.to("cpu").eval()
    layer.support_avx512bf16_for_cpu = True
    return layer


def test_unsafe_outputs_that_are_no_multiple_of_32_raise_in_evaluation() -> None:
    with pytest.raises(AssertionError, match="divisible"):
        _layer(48, 64)(torch.randn(2, 64))


@pytest.mark.parametrize("outputs", [48, 64, 1])
def test_safe_any_number_of_outputs_computes_with_the_stored_weights(outputs: int) -> None:
    layer = _layer(outputs, 128)
    make_safe(layer)
    x_NI = torch.randn(5, 128)
    weight_OI = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(layer(x_NI), x_NI @ weight_OI.t())


def test_a_model_that_was_packed_before_is_refused(tmp_path: Path) -> None:
    model = quantized(tmp_path / "dense")
    logits_of(model)
    with pytest.raises(RunError, match="21 of 21 4-bit layers are already packed"):
        make_safe(model)


@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_generation_packs_within_and_gives_back_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double_quant: bool) -> None:
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: True)
    model = quantized(tmp_path / "dense", double_quant=double_quant, intermediate_size=192 + 16 * 4)
    make_safe(model)
    before, logits = state_of(model), logits_of(model)
    with pytest.raises(KeyError), packed_generation(model):
        logits_of(model)
        packed = [bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False)) for layer in linear_4bit_layers(model)]
        raise KeyError
    assert all(packed)
    assert same(state_of(model), before)
    assert torch.equal(logits_of(model), logits)
    assert _gradients(model)[0].abs().max() > 0


def test_packed_generation_leaves_layers_that_the_kernel_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: True)
    layer = _layer(48, 64)
    make_safe(layer)
    x_NI = torch.randn(2, 64)
    expected = layer(x_NI)
    with packed_generation(layer):
        assert torch.equal(layer(x_NI), expected)


def test_packed_generation_does_nothing_where_the_cpu_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: False)
    layer = _layer(64, 64)
    make_safe(layer)
    with packed_generation(layer):
        assert not layer.support_avx512bf16_for_cpu


# int8 ---------------------------------------------------------------------------------------------------------------------------------


def test_int8_evaluate_then_save_then_reload_is_the_same_model(tmp_path: Path) -> None:
    model = quantized(tmp_path / "dense", "int8")
    before = state_of(model)
    logits = logits_of(model)
    assert same(state_of(model), before)
    assert torch.equal(logits_of(reloaded(model, tmp_path / "saved")), logits)


def test_int8_rounds_the_inputs_in_evaluation_and_only_the_weights_in_training(tmp_path: Path) -> None:
    model = quantized(tmp_path / "dense", "int8")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale_O1 = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale_O1).round() * scale_O1
    in_eval = logits_of(model)
    in_train = logits_of(model.train())
    expected, original = logits_of(rounded), logits_of(dense)
    assert (in_train - expected).norm() < 0.5 * (in_eval - expected).norm()
    assert (in_train - original).norm() < (in_eval - original).norm()


def test_int8_has_the_same_gradients_before_and_after_an_evaluation(tmp_path: Path) -> None:
    model = quantized(tmp_path / "dense", "int8")
    before = _gradients(model)
    logits_of(model)
    assert torch.equal(_gradients(model)[0], before[0])


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 50), (33, 65), (64, 3)])
@pytest.mark.parametrize("training", [False, True])
def test_int8_takes_any_width(outputs: int, inputs: int, training: bool) -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=True, has_fp16_weights=False, threshold=6.0)
    weight_OI, bias_O = layer.weight.data.clone(), layer.bias.data.clone()
    layer = layer.to("cpu").train(training)
    x_NI = torch.randn(9, inputs)
    expected = x_NI @ weight_OI.t() + bias_O
    assert (layer(x_NI) - expected).norm() < 0.02 * expected.norm()


# What stays as it is ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_head_embeddings_and_norms_stay_as_they_are(tmp_path: Path, scheme: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    dense = tiny_model("qwen3", tie_word_embeddings=False)
    dense.save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", scheme)
    kept = {name: tensor for name, tensor in dense.state_dict().items() if "proj.weight" not in name}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= kept.keys()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_that_8_bit_layers_cast_is_said_once_from_python_and_never_by_a_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safety, "_CASTS", safety._Once(safety._CASTS.begins))
    levels = {name: logging.getLogger(name).level for name in QUIET}
    for name in levels:  # a command of an earlier test may have silenced them
        logging.getLogger(name).setLevel(logging.NOTSET)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for known in list(logger.filters):
        logger.removeFilter(known)
    model = quantized(tmp_path / "dense", "int8").bfloat16()
    logits_of(model)
    casts = [message for message in caplog.messages if "inputs will be cast from torch.bfloat16" in message]
    assert len(casts) == 3 * 7  # each layer
    caplog.clear()
    for _ in range(2):
        make_safe(model)
        logits_of(model)
    assert [message for message in caplog.messages if "inputs will be cast" in message] == casts[:1]
    logger.warning("something else")
    logger.warning("something else")
    assert caplog.messages.count("something else") == 2
    caplog.clear()
    safety._CASTS.said.clear()
    try:
        log_plainly()
        logits_of(model)
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logger.removeFilter(safety._CASTS)
    assert not caplog.messages
