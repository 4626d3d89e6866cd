"""Calibrated weights of whole models: the stock format in a fresh process, less error than rounding, resume, and the step around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import llmlite
from llmlite.calibration.blocks import batches_of
from llmlite.context import Run
from llmlite.errors import ConfigError
from llmlite.evaluation.reload import reload_difference
from llmlite.hub.lines import loading_lines
from llmlite.models.load import load_model
from llmlite.models.safety import make_safe
from llmlite.quantization import calibrate as calibrate_module
from llmlite.quantization import second_order
from llmlite.quantization.calibrate import CalibratedScheme, calibrate, write_calibrated
from llmlite.quantization.error import error_report, layer_errors
from tests.conftest import build_tiny, logits_of, save_tiny, token_ids


def stock(folder: Path, scheme: str = "nf4", double_quant: bool = False) -> PreTrainedModel:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=scheme, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}).eval()
    make_safe(model)
    return model


def windows() -> list[dict[str, Tensor]]:
    return batches_of(token_ids(rows=16, length=32, seed=5))


@pytest.mark.parametrize(
    ("family", "scheme", "double_quant"),
    [("llama", "nf4", False), ("llama", "nf4", True), ("llama", "fp4", True), ("gpt2", "nf4", True), ("phi3", "nf4", False), ("gpt_neox", "fp4", False)],
)
def test_the_written_model_is_the_one_that_was_calibrated_at_the_stock_size(tmp_path: Path, family: str, scheme: Any, double_quant: bool) -> None:
    dense = build_tiny(family)
    dense.save_pretrained(tmp_path / "dense")
    original = logits_of(dense)
    model = stock(tmp_path / "dense", scheme, double_quant)
    model.save_pretrained(tmp_path / "stock")
    rounded = logits_of(model)
    errors = calibrate(dense, windows(), CalibratedScheme(scheme, double_quant), tmp_path / "codes")
    assert write_calibrated(model, tmp_path / "codes", scheme) == len(errors)
    logits = logits_of(model)
    torch.testing.assert_close(logits, logits_of(dense), rtol=1e-4, atol=1e-4)
    assert (logits - original).norm() < (rounded - original).norm()
    model.save_pretrained(tmp_path / "calibrated")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("calibrated", "stock"))
    described = "quant_state.bitsandbytes"  # JSON as bytes, whose length depends on the digits of one number
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype for name in ours if described not in name)
    for name in (name for name in ours if described in name):
        one, other = (json.loads(bytes(tensors[name].tolist())) for tensors in (ours, theirs))
        assert one.pop("nested_offset", None) is None or other.pop("nested_offset") is not None
        assert one == other
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated", dtype=torch.float32).eval()
    make_safe(again)
    assert torch.equal(logits_of(again), logits)


def test_a_fresh_process_without_llmlite_loads_the_calibrated_model(tmp_path: Path) -> None:
    dense = build_tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = stock(tmp_path / "dense", double_quant=True)
    calibrate(dense, windows(), CalibratedScheme(double_quant=True), tmp_path / "codes")
    write_calibrated(model, tmp_path / "codes", "nf4")
    model.save_pretrained(tmp_path / "out")
    assert reload_difference(model, loading_lines(tmp_path / "out", dtype="float32"))[0] == 0


def test_errors_of_all_layers_are_lower_than_those_of_rounding(tmp_path: Path) -> None:
    dense = build_tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    rounding = layer_errors(dense, stock(tmp_path / "dense"), windows())
    errors = calibrate(dense, windows(), CalibratedScheme(), tmp_path / "codes")
    assert errors.keys() == rounding.keys()
    assert len(errors) == 21
    assert all(errors[name] < rounding[name] for name in errors)


def test_the_layer_error_is_the_error_of_the_layers_output(tmp_path: Path) -> None:
    dense = build_tiny("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = stock(tmp_path / "dense")
    inputs: list[Tensor] = []
    layer, rounded = (m.get_submodule("model.layers.1.mlp.down_proj") for m in (dense, model))
    handle = layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    for batch in windows():
        dense(**batch)
    handle.remove()
    assert isinstance(rounded, nn.Module)
    with torch.no_grad():
        x = torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in inputs])
        expected = ((layer(x) - rounded(x)) ** 2).sum() / (layer(x) ** 2).sum()
    assert layer_errors(dense, model, windows())["model.layers.1.mlp.down_proj"] == pytest.approx(expected.item(), rel=1e-3)


def test_a_stopped_calibration_continues_and_ends_in_the_same_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = CalibratedScheme()
    whole = calibrate(build_tiny("llama"), windows(), how, tmp_path / "whole", tmp_path / "whole-walk")
    real, calls = second_order.calibrated_codes, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # in the second of three blocks, each with four kinds of inputs
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(calibrate_module, "calibrated_codes", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(build_tiny("llama"), windows(), how, tmp_path / "codes", tmp_path / "walk")
    again = calibrate(build_tiny("llama"), windows(), how, tmp_path / "codes", tmp_path / "walk")
    assert len(calls) == 6 + 8  # the first block was not done again
    assert again == whole
    files = sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) == 21
    for name in files:
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "codes" / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_layers_that_stand_out_are_named_with_what_to_write() -> None:
    errors = {f"model.layers.{n}.mlp.up_proj": 0.002 + 1e-5 * n for n in range(9)} | {"model.layers.0.mlp.down_proj": 0.3}
    report = error_report(errors)
    assert report["worst_layers"][0] == {"layer": "model.layers.0.mlp.down_proj", "relative_output_error": 0.3}
    assert "skip: [model.layers.0.mlp.down_proj]" in report["suggestion"]
    assert error_report(dict.fromkeys(errors, 0.01))["suggestion"] == ""


# The step -----------------------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"max_length": 64, "evaluation_rows": 6, "calibration_sequences": 8}


def test_quantize_nf4_runs_from_a_folder_to_a_stock_folder(tmp_path: Path, model_folder: Path, pairs_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llmlite")
    report = llmlite.QuantizeNf4(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), **SMALL).run()
    base, row = report.rows
    assert report.reload_difference is not None
    assert report.reload_difference < 1e-4
    assert row.parameters == base.parameters
    assert len(row.details["layer_errors"]) == 21
    assert row.details["worst_layers"][0]["relative_output_error"] == max(row.details["layer_errors"].values())
    assert f"quantize: {row.worst_layers()}" in caplog.messages
    for page in ("report.html", "README.md"):
        assert "Relative output error of a layer on calibration text" in (tmp_path / "out" / page).read_text(encoding="utf-8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("bitsandbytes", "nf4", True)
    assert not list((tmp_path / "out" / "steps").glob("*.work"))


def test_quantize_int8_measures_each_layer_without_calibration(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    report = llmlite.QuantizeInt8(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), **SMALL).run()
    errors = report.rows[1].details["layer_errors"]
    assert len(errors) == 21
    assert all(0 < error < 1e-3 for error in errors.values())


def test_the_threshold_of_int8_is_in_the_saved_config_and_is_computed_with(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    recipe = llmlite.QuantizeInt8(model=str(model_folder), data=str(pairs_file), llm_int8_threshold=1.0, report_sequences=0, **SMALL)
    out = recipe.run(tmp_path / "out").path
    config, ids_BT = json.loads((out / "config.json").read_text()), token_ids(vocab_size=320)
    assert config["quantization_config"]["llm_int8_threshold"] == 1.0
    ours = logits_of(AutoModelForCausalLM.from_pretrained(out).eval(), ids_BT)
    config["quantization_config"]["llm_int8_threshold"] = 6.0  # which no input of this model reaches
    (out / "config.json").write_text(json.dumps(config))
    usual = logits_of(AutoModelForCausalLM.from_pretrained(out).eval(), ids_BT)
    assert 0 < (ours - usual).norm() < 0.02 * usual.norm()


def test_quantize_after_another_step_saves_the_dense_model_once_and_reloads_it(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    steps = [{"step": "prune.ffn", "keep": 0.5}, {"step": "quantize", "scheme": "nf4"}]
    report = llmlite.Recipe.from_options(("test", {"model": str(model_folder), "data": str(pairs_file), "steps": steps, **SMALL})).run(tmp_path / "out")
    assert report.reload_difference is not None
    assert report.reload_difference < 1e-4
    assert report.rows[2].bytes_on_disk < report.rows[1].bytes_on_disk


def _checked(folder: Path, pairs_file: Path, **options: Any) -> Any:
    return llmlite.QuantizeNf4(model=str(folder), data=str(pairs_file), **SMALL, **options).check()


def test_widths_that_are_no_multiple_of_64_are_refused_before_anything_loads(tmp_path: Path, pairs_file: Path) -> None:
    folder = save_tiny(tmp_path / "narrow", intermediate_size=96)
    with pytest.raises(ConfigError, match=r"3 layers have an input width that is not a multiple of 64: model.layers.0.mlp.down_proj \(96\)"):
        _checked(folder, pairs_file)


@pytest.mark.parametrize("option", [{"unaligned": "skip"}, {"skip": ["down_proj"]}])
def test_such_layers_can_stay_as_they_are(tmp_path: Path, pairs_file: Path, option: dict[str, Any]) -> None:
    folder = save_tiny(tmp_path / "narrow", intermediate_size=96)
    report = llmlite.QuantizeNf4(model=str(folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), **SMALL, **option).run()
    ours, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    stayed = [name for name in dense if name.endswith("down_proj.weight")]
    assert len(stayed) == 3
    assert all(torch.equal(ours[name], dense[name]) for name in stayed)
    assert ours["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert len(report.rows[1].details["layer_errors"]) == 18


@pytest.mark.parametrize(("part", "stayed"), [("mlp", 9), ("layers.1", 7), ("model.layers.0.self_attn.q_proj", 1), ("o_proj", 3)])
def test_skip_takes_whole_names_and_parts_of_them(tmp_path: Path, model_folder: Path, pairs_file: Path, part: str, stayed: int) -> None:
    recipe = llmlite.QuantizeNf4(model=str(model_folder), data=str(pairs_file), skip=[part], **SMALL)
    state = recipe.steps[0].load(Run(recipe, tmp_path)).state_dict()
    dense = [name for name, tensor in state.items() if name.endswith("proj.weight") and tensor.dtype != torch.uint8]
    assert len(dense) == stayed
    assert all(f".{part}." in f".{name}" for name in dense)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_projections_outside_of_the_blocks_stay_dense(tmp_path: Path, pairs_file: Path, scheme: Any) -> None:
    folder = save_tiny(tmp_path / "opt", "opt", word_embed_proj_dim=32, do_layer_norm_before=False)  # as in opt-350m
    recipe = llmlite.Recipe(model=str(folder), data=str(pairs_file), steps=(llmlite.Quantize(scheme=scheme, calibrate=False, report_sequences=0),))
    state = recipe.steps[0].load(Run(recipe, tmp_path)).state_dict()
    dense = load_file(folder / "model.safetensors")
    for name in ("project_in", "project_out"):
        assert torch.equal(state[f"model.decoder.{name}.weight"].float(), dense[f"model.decoder.{name}.weight"].float())
    assert state["model.decoder.layers.0.fc1.weight"].dtype in (torch.uint8, torch.int8)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_biases_beside_codes_have_the_type_of_what_else_is_dense(tmp_path: Path, pairs_file: Path, scheme: Any) -> None:
    data = llmlite.Data(train=str(pairs_file), max_length=64)
    folder = save_tiny(tmp_path / "gpt2", "gpt2")  # stock transformers gives biases the type asked for, and other dense weights that of the file
    steps = (llmlite.Quantize(scheme=scheme, dtype="bfloat16", calibrate=False, report_sequences=0), llmlite.Lora(r=4, max_steps=1))
    report = llmlite.Recipe(model=str(folder), data=data, steps=steps[:1], output_dir=str(tmp_path / "out")).run()
    assert report.reload_difference < 0.05
    assert 'dtype="bfloat16"' in report.loading
    again = load_model(tmp_path / "out", llmlite.Model(name="gpt2"), torch.device("cpu"))
    assert {tensor.dtype for tensor in again.parameters() if tensor.is_floating_point()} == {torch.bfloat16}
    trained = llmlite.Recipe(model=str(folder), data=data, steps=steps, output_dir=str(tmp_path / "adapted")).run()
    assert trained.reload_difference < 0.05


def test_a_name_to_skip_that_no_layer_has_is_refused(model_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"skip: 'downproj' is part of no layer's name.*down_proj"):
        _checked(model_folder, pairs_file, skip=["downproj"])


def test_a_recipe_that_would_quantize_nothing_is_refused(model_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match="leave no layer to quantize"):
        _checked(model_folder, pairs_file, skip=["mlp", "self_attn"])


def test_what_stays_dense_can_be_kept_in_16_bit_and_comes_back_so(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    def run(dtype: str) -> Any:
        step = llmlite.Quantize(scheme="nf4", calibrate=False, report_sequences=0, dtype=dtype)  # type: ignore[arg-type]
        recipe = llmlite.Recipe(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / dtype), steps=[step], max_length=64, evaluation_rows=4)
        return recipe.check().rows[-1], recipe.run()

    (_, wide), (planned, narrow) = run("float32"), run("bfloat16")
    assert narrow.reload_difference == 0.0
    assert narrow.rows[-1].bytes_on_disk == pytest.approx(planned["disk_bytes"], rel=0.01)
    assert narrow.rows[-1].bytes_on_disk < wide.rows[-1].bytes_on_disk - 320 * 64
    assert narrow.rows[-1].perplexity == pytest.approx(wide.rows[-1].perplexity, rel=0.02)
