"""Every kind of adapter trains by the one path, is saved in peft's format, reloads in a fresh process, and merges where it can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.adapters import prefix
from llmlite.adapters.lora import Lora
from llmlite.adapters.merge import merged
from llmlite.errors import ConfigError
from llmlite.evaluation.speed import measure_latency
from llmlite.models.adapted import adapter_parameters
from llmlite.quantization.bnb import Quantize
from llmlite.report import Report
from llmlite.training.settings import TrainingStep
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, save_tiny, tiny_config, token_ids

SMALL: dict[str, Any] = {"max_length": 64, "evaluation_rows": 4}
SHORT: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2}
NF4 = Quantize(scheme="nf4", calibrate=False, report_sequences=0)

KINDS: dict[str, TrainingStep] = {
    "dora": Lora(r=4, use_dora=True, **SHORT),
    "rslora": Lora(r=4, use_rslora=True, rank_pattern={"down": 8, "q_proj": 2}, **SHORT),
    "lora+": Lora(r=4, loraplus_lr_ratio=16, **SHORT),
    "embeddings": Lora(r=4, modules_to_save=("embed_tokens",), **SHORT),
    "ia3": llmlite.Ia3(**SHORT),
    "bottleneck": llmlite.Bottleneck(bottleneck_size=8, **SHORT),
    "parallel": llmlite.Bottleneck(bottleneck_size=8, placement="parallel", **SHORT),
}


def run(model: Path, rows: Path, out: Path, *steps: Any, **data: Any) -> Report:
    return llmlite.Recipe(model=str(model), data=str(rows), output_dir=str(out), steps=steps, **{**SMALL, **data}).run()


@pytest.mark.parametrize(("kind", "base"), list(zip(KINDS, ("nf4", "nf4", "dense", "dense", "nf4", "nf4", "dense"), strict=True)))
def test_each_kind_trains_as_planned_and_reloads_in_a_fresh_process(kind: str, base: str, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    steps = [KINDS[kind]] if base == "dense" else [NF4, KINDS[kind]]
    recipe = llmlite.Recipe(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), steps=steps, **SMALL)
    planned = recipe.check().rows[-1]
    report = recipe.run()
    assert report.rows[-1].parameters == planned["parameters"]
    assert report.rows[-1].parameters - report.rows[-2].parameters == planned["trained_parameters"] > 0
    assert report.rows[-1].perplexity != report.rows[-2].perplexity
    assert report.reload_difference == 0.0
    assert ("load_adapter" in report.loading) == (kind in {"bottleneck", "parallel"})


def test_a_prefix_trains_unpacked_and_reloads(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    step = llmlite.Prefix(num_virtual_tokens=4, **SHORT)
    with pytest.raises(ConfigError, match=r"set data\.packing: false"):
        run(model_folder, pairs_file, tmp_path / "packed", step)
    report = run(model_folder, pairs_file, tmp_path / "out", step, packing=False)
    assert report.reload_difference == 0.0
    assert report.rows[-1].parameters - report.rows[0].parameters == 2 * 4 * 3 * 32
    assert report.rows[-1].perplexity != report.rows[0].perplexity


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_prefix_starts_as_text_that_the_model_has_read(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, ids_BT = build_tiny(family), token_ids(rows=1, length=12)
    rows = [{"input_ids": ids_BT[0, :3].tolist()}, {"input_ids": ids_BT[0, 3:8].tolist()}]
    with torch.no_grad():
        expected = model(input_ids=ids_BT, use_cache=False).logits[:, 4:]
    adapted = peft.get_peft_model(model, llmlite.Prefix(num_virtual_tokens=4).peft_config(model.config)).eval()
    prefix._start_from_text(adapted, rows, 4)
    with torch.no_grad():
        found = adapted(input_ids=ids_BT[:, 4:]).logits
    assert not caplog.records
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_longer_than_all_text_starts_at_random_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build_tiny("llama")
    adapted = peft.get_peft_model(model, llmlite.Prefix(num_virtual_tokens=9).peft_config(model.config))
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    prefix._start_from_text(adapted, [{"input_ids": [5, 6, 7]}], 9)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())
    assert "prefix: starts from random numbers, not from text" in caplog.text


def test_speed_with_a_prefix_is_measured_within_the_positions_that_the_model_has() -> None:
    adapted = peft.get_peft_model(build_tiny("gpt2"), llmlite.Prefix(num_virtual_tokens=9).peft_config(tiny_config("gpt2")))
    assert measure_latency(adapted, prompt_tokens=200, new_tokens=4, repeats=1).prompt_tokens == 128 - 9 - 4


def test_a_prefix_that_leaves_no_positions_for_the_text_is_refused(pairs_file: Path, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "gpt2", "gpt2")  # whose positions are a table of 128
    for tokens in (65, 200):
        with pytest.raises(ConfigError, match=rf"num_virtual_tokens={tokens} before rows of max_length=64 tokens are more than 128"):
            run(base, pairs_file, tmp_path / "out", llmlite.Prefix(num_virtual_tokens=tokens), packing=False)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_plan_counts_what_peft_adds_on_every_family(family: str) -> None:
    for step in (Lora(r=4, use_dora=True, rank_pattern={"down": 6}), llmlite.Ia3(), llmlite.Prefix(num_virtual_tokens=3)):
        model = build_tiny(family)
        assert adapter_parameters(peft.get_peft_model(model, step.peft_config(model.config))) == step.added_parameters(model.config)[0], step.label


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(kind, scheme) for kind in ("dora", "rslora", "ia3") for scheme in ("dense", "nf4", "int8") if (kind, scheme) != ("dora", "int8")],
)
def test_a_merged_model_is_the_adapted_one_and_merging_twice_is_merging_once(kind: str, scheme: str, model_folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    from llmlite.models.safety import make_safe

    quantization = {"nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "int8": BitsAndBytesConfig(load_in_8bit=True)}.get(scheme)
    options = {"quantization_config": quantization} if quantization else {}
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, device_map={"": "cpu"}, **options).eval()
    make_safe(base)
    adapted: Any = peft.get_peft_model(base, KINDS[kind].peft_config(base.config)).eval()  # type: ignore[attr-defined]
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 35)[None]
    if scheme == "int8":  # in training the inputs are not rounded, as in the merged model
        adapted.train()
    expected = logits_of(adapted, ids)
    once, twice = merged(adapted, torch.float32), merged(adapted, torch.float32)
    assert torch.allclose(logits_of(once, ids), expected, atol=2e-3 * float(expected.abs().max()))
    assert all(torch.equal(one, two) for one, two in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    assert torch.equal(logits_of(adapted, ids), expected)
    assert not hasattr(once.config, "quantization_config")


def test_merge_then_quantize_again_shows_the_perplexity_of_each(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    steps = (NF4, Lora(r=4, **SHORT), llmlite.Merge(), Quantize(scheme="nf4", calibrate=True))
    report = run(model_folder, pairs_file, tmp_path / "out", *steps, calibration_sequences=4, calibration=str(pairs_file))
    assert [row.name for row in report.rows] == ["base", "quantize", "lora", "merge", "quantize"]
    assert report.rows[3].perplexity == pytest.approx(report.rows[2].perplexity, rel=1e-3)
    assert report.rows[4].perplexity != report.rows[3].perplexity
    dense = json.loads((tmp_path / "out" / "steps" / "03-merge" / "config.json").read_text())
    assert "quantization_config" not in dense
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def test_what_does_not_go_together_is_refused_before_weights_load(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    def problem(*steps: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            llmlite.Recipe(model=str(model_folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), steps=steps, **SMALL).check()
        return str(caught.value)

    assert "no adapter to merge" in problem(llmlite.Merge())
    assert "already carries an adapter. Put a step 'merge'" in problem(Lora(), Lora())
    assert "did you mean 'embed_tokens'" in problem(Lora(modules_to_save=("embed_token",)))
    assert "rank_pattern: 'down' names layers that target_modules leaves out" in problem(Lora(target_modules=("q",), rank_pattern={"down": 4}))
    assert "use_dora measures row sizes" in problem(NF4, Lora(use_dora=True, init_lora_weights="quantization_error"))
    assert "use_dora does not train on an int8 base" in problem(Quantize(scheme="int8", report_sequences=0), Lora(use_dora=True))
    assert "match no layer" in problem(Lora(target_modules=("nothing",)))


def test_roles_name_the_same_layers_on_every_family() -> None:
    assert (
        Lora(r=2, target_modules=("down",)).added_parameters(tiny_config("llama"))[0]
        == Lora(r=2, target_modules=("down",)).added_parameters(tiny_config("gpt2"))[0]
    )
