"""One block in memory at a time gives the bits of the whole model: files, figures, resume, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmlite
from llmlite.calibration import blocks as blocks_module
from llmlite.context import Run
from llmlite.errors import ConfigError, LoadError, ResourceError
from llmlite.evaluation.speed import Speed
from llmlite.loading import decide_loading
from llmlite.models.blockwise import is_blockwise, load_blockwise, present, rebuilt, write_blockwise
from llmlite.models.find import find, weight_bytes
from llmlite.models.load import load_model
from llmlite.models.rebuild import rebuild
from llmlite.models.safety import make_safe
from llmlite.models.settings import Model
from llmlite.models.slicing import take_ffn_channels, take_kv_groups
from llmlite.models.tensor_files import TensorFiles
from llmlite.models.view import ModelView
from llmlite.plan import size_line
from llmlite.report import Report
from llmlite.step import Step
from tests.conftest import ALL_FAMILIES, HEAD_FAMILIES, build_tiny, build_tokenizer, logits_of, save_tiny, token_ids

CPU = torch.device("cpu")
FLOAT32 = Model(name="tiny", dtype="float32")


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def require_same_folder(one: Path, other: Path) -> None:
    """The same tensors under the same names, bit for bit, and the same configs."""
    ours, theirs = tensors_in(one), tensors_in(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])] == []
    for name in ("config.json", "generation_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())


# the model ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_a_model_in_blocks_computes_and_is_written_as_the_whole_one_in_every_family(name: str, tmp_path: Path) -> None:
    build_tiny(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model = load_blockwise(tmp_path / "base", FLOAT32, CPU)
    view = ModelView(model)
    assert torch.equal(logits_of(model), logits_of(whole))
    assert all(parameter.is_meta for block in view.blocks for parameter in block.module.parameters())
    write_blockwise(model, tmp_path / "again", torch.bfloat16)
    require_same_folder(tmp_path / "again", tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert torch.equal(logits_of(again), logits_of(whole))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_slicing_block_by_block_is_slicing_the_whole_model(name: str, tmp_path: Path) -> None:
    build_tiny(name).save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = load_blockwise(tmp_path / "base", FLOAT32, CPU)
    takes: list[Callable[..., Any]] = [lambda view: take_ffn_channels(view, [[1, 2, layer + 5, 40] for layer in range(3)])]
    if name in HEAD_FAMILIES:
        takes.append(lambda view: take_kv_groups(view, [[layer % view.kv_heads] for layer in range(3)]))
    for take in takes:
        whole, model = rebuild(whole, *take(ModelView(whole))), rebuilt(model, take)
    assert is_blockwise(model)
    assert torch.equal(logits_of(model), logits_of(whole))


def test_files_of_other_times_are_read_or_refused_by_name(tmp_path: Path) -> None:
    build_tiny("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file({name.removeprefix("transformer."): tensor for name, tensor in stored.items()}, file, metadata={"format": "pt"})  # as gpt2 lies on the Hub
    assert torch.equal(logits_of(load_blockwise(tmp_path, FLOAT32, CPU)), logits_of(build_tiny("gpt2")))
    save_file({name.replace("c_proj", "old_name"): tensor for name, tensor in stored.items()}, file, metadata={"format": "pt"})
    model = load_blockwise(tmp_path, FLOAT32, CPU)
    with pytest.raises(LoadError, match=r"no tensor 'transformer.h.0.attn.c_proj.weight'.*load: whole"), present(ModelView(model).blocks[0]):
        pass


def test_weights_beside_those_that_stock_transformers_reads_are_not_read(tmp_path: Path) -> None:
    build_tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    stored = tensors_in(tmp_path)
    size = weight_bytes(tmp_path)
    other = {name.removeprefix("model."): tensor + 1 for name, tensor in stored.items()}  # another library's copy, with some of the names
    save_file({**other, **{name: tensor + 1 for name, tensor in stored.items()}}, tmp_path / "other.safetensors")
    assert torch.equal(logits_of(load_blockwise(tmp_path, FLOAT32, CPU)), logits_of(build_tiny("llama")))
    assert weight_bytes(tmp_path) == size == sum(file.stat().st_size for file in tmp_path.glob("model-*.safetensors"))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(LoadError, match="neither model.safetensors nor model.safetensors.index.json"):
        find(Model(name=str(tmp_path)))


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_have_the_rows_that_they_have_in_a_whole_model(tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, vocab_size=len(build_tokenizer()), tie_word_embeddings=tied)
    (folder / "tokenizer_config.json").unlink()  # the tokenizer is whole without it
    settings = dataclasses.replace(FLOAT32, name=str(folder), add_tokens=("<tool>", "</tool>"))
    whole, model = load_model(folder, settings, CPU), load_blockwise(folder, settings, CPU)
    assert whole.config.vocab_size == model.config.vocab_size == len(build_tokenizer()) + 2
    ids = torch.tensor([[5, model.config.vocab_size - 1, 7, model.config.vocab_size - 2]])
    assert torch.equal(logits_of(model, ids), logits_of(whole, ids))


def test_a_folder_whose_index_could_not_be_written_does_not_look_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny("llama").save_pretrained(tmp_path / "base")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = load_blockwise(tmp_path / "base", FLOAT32, CPU)
    monkeypatch.setattr("json.dump", full)
    monkeypatch.setattr("llmlite.storage.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_blockwise(model, tmp_path / "again", torch.float32)
    assert not (tmp_path / "again" / "model.safetensors.index.json").exists()


def test_tensors_are_read_without_mapping_and_a_short_file_is_damage(tmp_path: Path) -> None:
    build_tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    files, stored = TensorFiles(tmp_path), load_file(tmp_path / "model.safetensors")
    assert sorted(files.names()) == sorted(stored)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in stored.items())
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(LoadError, match="is damaged"):
        for name in files.names():
            files.read(name)


@pytest.mark.parametrize("scheme", ["dense", "nf4", "int8"])
def test_no_block_stays_in_memory_when_it_was_used(scheme: str, tmp_path: Path) -> None:
    build_tiny("llama").save_pretrained(tmp_path)
    how = {"nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "int8": BitsAndBytesConfig(load_in_8bit=True)}.get(scheme)
    model = load_blockwise(tmp_path, FLOAT32, CPU, quantization_config=how)
    make_safe(model)

    assert logits_of(model).isfinite().all()
    modules = [module for block in ModelView(model).blocks for module in block.module.modules()]
    places = [*(vars(module) for module in modules), *(module._parameters for module in modules), *(vars(m.state) for m in modules if hasattr(m, "state"))]
    held = {name for place in places for name, value in place.items() if isinstance(value, Tensor) and not value.is_meta}
    assert not held
    assert not any(getattr(module, "quant_state", None) for module in modules)


# whole runs ---------------------------------------------------------------------------------------------------------------------------

_NF4 = llmlite.Quantize(token_weights="equal", tune_epochs=0)
STEPS: dict[str, tuple[Step, ...]] = {
    "sparsegpt": (llmlite.PruneWeights(),),
    "owl, magnitude": (llmlite.PruneWeights(method="magnitude", allocation="owl"),),
    "structured": (llmlite.PruneStructured(keep_parameters=0.7, multiple_of=16, spread="query_heads+ffn"),),
    "biases, nf4": (llmlite.PruneFfn(keep=0.5, bias_compensation=True, inputs="dense"), _NF4),
    "int8": (llmlite.Quantize(scheme="int8", report_sequences=4),),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("blockwise") / "base", num_hidden_layers=3)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def recipe(base: Path, rows: Path, out: Path, steps: tuple[Step, ...], load: Any = "blocks", **options: Any) -> llmlite.Recipe:
    data = llmlite.Data(train=str(rows), calibration=str(rows), max_length=32, calibration_sequences=8, evaluation_rows=6)
    return llmlite.Recipe(model=Model(name=str(base), load=load), data=dataclasses.replace(data, **options), steps=steps, output_dir=str(out))


@pytest.mark.parametrize("steps", STEPS)
def test_a_run_in_blocks_leaves_the_bits_and_the_figures_of_a_whole_run(
    steps: str, base: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmlite.pipeline._Pipeline._finish", lambda self: self.kept.link_result())  # the reload has a test of its own
    monkeypatch.setattr("llmlite.evaluation.speed.measure_speed", lambda _model: Speed(1.0, 1.0))
    monkeypatch.setattr("llmlite.evaluation.sample.sample", lambda *_: {"prompt": "", "expected": "", "answer": ""})
    monkeypatch.setattr(blocks_module, "SPILL_BYTES", 1)  # hidden states of all batches but the first lie in files
    whole, blocks = (recipe(base, pairs_file, tmp_path / load, STEPS[steps], load).run() for load in ("whole", "blocks"))
    require_same_folder(blocks.path, whole.path)
    for one, other in zip(whole.rows, blocks.rows, strict=True):
        assert (one.perplexity, one.kl, one.top1_agreement, one.parameters) == (other.perplexity, other.kl, other.top1_agreement, other.parameters)
        assert one.details.get("layer_errors") == other.details.get("layer_errors")
        assert other.decode_tokens_per_second is None
        assert "speed" in other.details["not_measured"]
    assert len(list(blocks.path.glob("model-*.safetensors"))) == 4
    assert not list(blocks.path.glob(".hidden-*"))


def test_the_dense_result_is_proved_by_stock_transformers_with_its_blocks_on_disk(base: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = recipe(base, pairs_file, tmp_path / "out", (llmlite.PruneWeights(method="wanda"),)).run()
    assert report.reload_difference == 0
    assert "device_map" not in report.loading
    assert Report.read(report.path).rows == report.rows
    assert (report.path / "report.html").is_file()


@pytest.mark.parametrize("where", ["walk", "shards"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(where: str, base: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.pipeline._Pipeline._finish", lambda self: self.kept.link_result())
    steps = (llmlite.PruneWeights(),)
    expected = recipe(base, pairs_file, tmp_path / "whole", steps).run()
    place = "llmlite.calibration.walk._keep" if where == "walk" else "llmlite.models.blockwise._write_shard"
    module, _, name = place.rpartition(".")
    real, calls = getattr(__import__(module, fromlist=[name]), name), []

    def stops(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(place, stops)
        with pytest.raises(KeyboardInterrupt):
            recipe(base, pairs_file, tmp_path / "out", steps).run()
    again: list[Any] = []
    monkeypatch.setattr(place, lambda *args: (again.append(args), real(*args))[1])
    report = recipe(base, pairs_file, tmp_path / "out", steps).run()
    assert len(again) == {"walk": 1, "shards": 2}[where]  # of 3 blocks; of 4 shards
    require_same_folder(report.path, expected.path)


# the plan -----------------------------------------------------------------------------------------------------------------------------


def test_steps_that_need_the_whole_model_are_refused_before_anything_loads(base: Path, pairs_file: Path, tmp_path: Path) -> None:
    steps = (llmlite.PruneStructured(), llmlite.PruneFfn(score="taylor"), llmlite.PruneWeights(token_weights="sensitivity"), llmlite.Quantize())
    with pytest.raises(ConfigError) as caught:
        recipe(base, pairs_file, tmp_path / "out", steps, calibration="self").check()
    text = str(caught.value)
    assert "steps[0] prune.structured: load: blocks cannot do this step: spread: measured tries out whole models" in text
    assert "steps[1] prune.ffn: load: blocks cannot do this step: score: taylor" in text
    assert "steps[3] quantize: load: blocks cannot do this step: token_weights: sensitivity and tuned scales go backward" in text
    assert "steps[2] prune.weights: load: blocks cannot do this step: token_weights: sensitivity goes backward" in text
    assert "cannot calibrate on text of the model itself" in text
    with pytest.raises(ConfigError, match=r"steps\[0\] lora: load: blocks cannot do this step: it works on the whole model. What can: prune.weights"):
        recipe(base, pairs_file, tmp_path / "out", (llmlite.Lora(),)).check()


def test_auto_takes_blocks_exactly_when_the_whole_does_not_fit_and_the_plan_says_so(
    base: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = recipe(base, pairs_file, tmp_path / "out", (llmlite.PruneWeights(),), load="auto")
    free = {"bytes": 10**15}
    monkeypatch.setattr("llmlite.memory.free_bytes", lambda _device: free["bytes"])
    context = Run(able)
    assert llmlite.plan.check(able, context).loading == ""
    assert not context.blockwise
    free["bytes"] = 1000
    plan = llmlite.plan.check(able, context)
    assert context.blockwise
    assert "One decoder block at a time" in size_line(plan)
    unable = recipe(base, pairs_file, tmp_path / "out", (llmlite.PruneStructured(),), load="auto")
    assert "load: blocks it would be less, but: steps[0] prune.structured" in unable.check().loading
    whole = recipe(base, pairs_file, tmp_path / "out", (llmlite.PruneWeights(),), load="whole")
    assert "That is more than the 1 kB that are free here. With load: blocks it would be " in whole.check().loading


def test_the_plan_of_a_large_model_is_lower_in_blocks(base: Path, pairs_file: Path, tmp_path: Path) -> None:
    large = save_tiny(tmp_path / "large", hidden_size=256, intermediate_size=512, num_hidden_layers=40)
    whole, blocks = (recipe(large, pairs_file, tmp_path / load, (_NF4,), load).check() for load in ("whole", "blocks"))
    layer = 4 * (256 * 256 * 3 + 3 * 256 * 512)
    assert whole.peak_bytes - blocks.peak_bytes > 30 * layer
    context = Run(recipe(large, pairs_file, tmp_path / "out", (_NF4,), "blocks"))
    assert decide_loading(context.recipe, context, 10, 5, []).startswith("One decoder block")


_LIMITED = """
import resource
from llmlite.memory import free_bytes
before = free_bytes()
resource.setrlimit(resource.RLIMIT_DATA, (10**9, resource.RLIM_INFINITY))
print(before, free_bytes())
"""


def test_a_disk_that_is_full_when_hidden_states_go_to_files_is_one_error(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []

    def full(_descriptor: int, _offset: int, size: int) -> None:
        wanted.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blocks_module, "SPILL_BYTES", 1)
    monkeypatch.setattr("os.posix_fallocate", full)
    model = load_blockwise(base, FLOAT32, CPU, spill=tmp_path)
    with pytest.raises(ResourceError, match="the disk is full"):
        blocks_module.Blocks(model, blocks_module.batches_of(token_ids(rows=8, length=16)))
    assert wanted == [2 * 16 * 64 * 4]  # of the second batch: windows, tokens, hidden size, float32
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_hidden_states_that_go_to_files(base: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(base, pairs_file, tmp_path / "out", (llmlite.PruneWeights(),))
    before = made.check().disk_bytes
    monkeypatch.setattr(blocks_module, "SPILL_BYTES", 1000)
    assert made.check().disk_bytes - before == 3 * (8 * 32 * 64 * 4 - 1000)  # rows, tokens, hidden size, float32: before a block, behind it, attention


def test_what_is_free_is_never_more_than_the_process_may_take() -> None:
    done = subprocess.run([sys.executable, "-c", _LIMITED], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 0 < after < 10**9
    assert after <= before
