"""Pruning recipes by the public door, on a tiny model: check, prune, train on, reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmlite
from llmlite import recipes
from llmlite.data.settings import Data
from llmlite.models.size import count_zeros, size_of_model
from tests.conftest import build_tiny, token_ids

pytestmark = pytest.mark.usefixtures("own_cache")


def options(model_folder: Path, pairs_file: Path, out: Path) -> dict[str, Any]:
    data = Data(train=str(pairs_file), max_length=32, calibration_sequences=8, evaluation_rows=8)
    return {"model": str(model_folder), "data": data, "output_dir": str(out)}


def test_zeros_survive_training_and_are_in_the_file(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    steps = (llmlite.PruneWeights(sparsity="2:4"), llmlite.Finetune(max_steps=3, learning_rate=1e-2))
    llmlite.Recipe(steps=steps, **options(model_folder, pairs_file, tmp_path / "out")).run()
    before, after = (count_zeros(folder) for folder in (tmp_path / "out/steps/01-prune.weights", tmp_path / "out"))
    assert before.sparsity == pytest.approx(0.5)
    assert after.zeros >= before.zeros
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "out/steps/01-prune.weights", tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])  # it did train
    assert not other[name][one[name] == 0].any()


def test_the_structured_preset_prunes_to_what_its_plan_says(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    recipe = recipes.PruneStructured(**options(model_folder, pairs_file, tmp_path / "out"), keep_parameters=0.8, multiple_of=4)
    planned = recipe.check().rows[-1]["parameters"]
    report = recipe.run()
    model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", model_folder))
    assert model.num_parameters() == report.rows[-1].parameters == pytest.approx(planned, rel=0.03)  # where it goes is measured later
    assert report.rows[1].details["trials"]
    assert size_of_model(model).decoder / size_of_model(dense).decoder == pytest.approx(0.8, abs=0.01)


def test_only_matrices_with_many_zeros_are_held() -> None:
    from llmlite.training.keep_zeros import KeepZeros

    model = build_tiny("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, ::2] = 0
        model.model.layers[1].mlp.up_proj.weight.zero_()  # as lora_B starts
    callback = KeepZeros()
    callback.on_train_begin(None, None, None, model=model)
    assert [parameter is weight for parameter, _ in callback.zeros] == [True]
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    with torch.no_grad():
        weight -= weight.grad
        assert weight[:, ::2].any()
    callback.on_optimizer_step(None, None, None)
    assert not weight[:, ::2].any()
