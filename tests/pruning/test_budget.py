"""Where a budget is cut is measured: trials are what the cut really costs, leave the model alone, and go on where they were stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import llmlite
from llmlite.calibration.blocks import Blocks
from llmlite.errors import ConfigError
from llmlite.models.size import size_of_config, size_of_model
from llmlite.pruning.budget import Spread, Trials, cuts_of, fitted, neighbours, search
from llmlite.pruning.layers import calibration_loss
from llmlite.pruning.units import cut_units
from llmlite.step import ModelPlan
from tests.conftest import build_tiny, logits_of, tiny_config, token_ids
from tests.pruning.test_steps import run_of

STEP = llmlite.PruneStructured(inputs="dense", keep_parameters=0.8)
WINDOWS = token_ids(10, 24, seed=3)


@pytest.mark.parametrize("spread", [Spread(channels=48), Spread(query_heads=2), Spread(kv_groups=1)], ids=str)
def test_a_trial_costs_what_the_cut_costs(spread: Spread, tmp_path: Path) -> None:
    model = build_tiny("qwen2")
    before = logits_of(model)
    trials = Trials(model, WINDOWS, STEP, "obs", tmp_path)
    loss = trials.loss(spread)
    assert torch.equal(logits_of(model), before)
    cuts, config = cuts_of(model.config, spread, "obs")
    small, _ = cut_units(build_tiny("qwen2"), cuts, WINDOWS[2:], STEP)
    assert size_of_model(small) == size_of_config(config)
    assert loss == pytest.approx(calibration_loss(small, WINDOWS[:2]), rel=1e-4)
    assert loss != pytest.approx(calibration_loss(model, WINDOWS[:2]), rel=1e-4)


def test_a_trial_without_layers_skips_those_of_least_influence(tmp_path: Path) -> None:
    model = build_tiny("llama")
    trials = Trials(model, WINDOWS, STEP, None, tmp_path)
    gone = trials.removed_layers(Spread(layers=1))
    assert gone == [min(range(3), key=trials.influence.__getitem__)]
    assert trials.loss(Spread(layers=1)) == pytest.approx(calibration_loss(model, WINDOWS[:2], gone))


def test_trials_that_were_stopped_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build_tiny("gpt2"), []
    collect = Blocks.collect

    def stopped(self: Blocks, block, *args, **options):
        if block.index == 2 and not seen:
            seen.append(block.index)
            raise KeyboardInterrupt
        return collect(self, block, *args, **options)

    whole = Trials(model, WINDOWS, STEP, None, tmp_path / "whole").loss(Spread(channels=40))
    monkeypatch.setattr(Blocks, "collect", stopped)
    with pytest.raises(KeyboardInterrupt):
        Trials(model, WINDOWS, STEP, None, tmp_path / "stopped")
    again = Trials(model, WINDOWS, STEP, None, tmp_path / "stopped")
    assert again.loss(Spread(channels=40)) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(Blocks, "collect", lambda *_: pytest.fail("nothing is left to collect"))
    monkeypatch.setattr("llmlite.pruning.layers.calibration_loss", lambda *_: pytest.fail("nothing is left to measure"))
    assert Trials(model, WINDOWS, STEP, None, tmp_path / "stopped").loss(Spread(channels=40)) == again.loss(Spread(channels=40))


def test_one_of_a_kind_is_named_in_the_singular() -> None:
    assert str(Spread(layers=1, kv_groups=1, channels=1024)) == "1 layer, 1 key/value group, 1,024 FFN channels"
    assert str(Spread(layers=2, query_heads=1)) == "2 layers, 1 query head"
    for keep, note in ((1, "1 of 3 layers stays"), (2, "2 of 3 layers stay")):
        config = tiny_config("llama")
        plan = llmlite.PruneLayers(keep=keep / 3).check(ModelPlan(config), run_of(config))
        assert plan.notes == (note,)


def test_every_spread_of_a_search_takes_the_same_share() -> None:
    config = tiny_config("mistral", num_attention_heads=8, head_dim=8, intermediate_size=512, num_hidden_layers=12)
    dense = size_of_config(config).decoder
    _, found = search(config, 0.75, lambda spread: float(spread.channels))
    assert len(found) > 4
    assert any(spread.layers or spread.kv_groups for spread in found)
    for spread in found:
        layers = 12 - spread.layers
        narrowed = cuts_of(config, spread)[1]
        assert narrowed.num_hidden_layers == layers
        assert size_of_config(narrowed).decoder / dense == pytest.approx(0.75, abs=0.01)


def test_a_search_goes_downhill_and_stops_where_nothing_is_better() -> None:
    config = tiny_config("mistral", num_attention_heads=8, head_dim=8, intermediate_size=512, num_hidden_layers=12)

    def loss(spread: Spread) -> float:
        return abs(spread.layers - 2) + (0.5 if spread.kv_groups else 0.0) + abs(spread.query_heads - 2) / 2

    best, found = search(config, 0.75, loss, most=30)
    assert (best.layers, best.query_heads, best.kv_groups) == (2, 2, 0)
    assert loss(best) == min(found.values())
    assert len(search(config, 0.75, loss, most=3)[1]) == 3
    only_channels, _ = search(config, 0.75, lambda spread: spread.layers + spread.query_heads + spread.kv_groups)
    assert dataclasses.replace(only_channels, channels=0) == Spread()


def test_what_channels_cannot_carry_starts_with_layers_and_what_nothing_carries_is_refused() -> None:
    config = tiny_config("gpt2", n_layer=6)
    assert fitted(config, Spread(), 0.3) is None
    assert next(iter(search(config, 0.3, lambda _: 1.0)[1])).layers > 0
    assert all(spread.layers or not (spread.kv_groups or spread.query_heads) for spread in search(config, 0.8, lambda _: 1.0)[1])
    assert {spread.kv_groups for spread in neighbours(config, Spread())} == {0}  # every head of gpt2 has its own keys and values
    with pytest.raises(ConfigError, match="cannot be reached"):
        search(config, 0.01, lambda _: 1.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_the_measured_step_leaves_the_share_and_says_what_it_tried(name: str) -> None:
    model = build_tiny(name)
    dense, run = size_of_model(model).decoder, run_of(model.config, WINDOWS)
    small = llmlite.PruneStructured(keep_parameters=0.7, multiple_of=2).apply(model, run)
    assert size_of_model(small).decoder / dense == pytest.approx(0.7, abs=0.02)
    assert len(run.notes["trials"]) >= 1
    assert run.notes["spread"]["layers"] == len(run.notes.get("removed_layers", []))
    if "ffn" in run.notes:
        assert {len(gone) for gone in run.notes["ffn"]["removed"]} == {run.notes["spread"]["channels"]}
