"""Every pruning step on every family: the plan is what comes out, stock code reloads it, and nothing asked is nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llmlite
from llmlite.context import Run
from llmlite.errors import ConfigError
from llmlite.evaluation.quality import measure_quality
from llmlite.models.size import count_zeros, size_of_model
from llmlite.models.view import ModelView
from llmlite.pruning import units
from llmlite.pruning.layers import calibration_loss, greedy_layers, influences
from llmlite.pruning.structured import allocate
from llmlite.step import ModelPlan, Step
from tests.conftest import ALL_FAMILIES, FIXED_HEAD_FAMILIES, HEAD_FAMILIES, build_tiny, logits_of, require_stock_reload, tiny_config, token_ids
from tests.pruning.test_scores import follows_pattern


def run_of(config: Any, windows: torch.Tensor | None = None) -> Run:
    """A run whose model and calibration windows are given."""
    run = Run(llmlite.Recipe(steps=(llmlite.Lora(),)))
    run.__dict__["config"] = config
    run.__dict__["calibration_windows"] = token_ids(16, 24, seed=3) if windows is None else windows
    return run


def prune(model: PreTrainedModel, *steps: Step) -> tuple[Any, Run]:
    """Check and apply, and hold the plan against the result."""
    run = run_of(model.config)
    for step in steps:
        plan = step.check(ModelPlan(model.config, parameters=model.num_parameters()), run)
        model = step.apply(model, run)
        assert plan.parameters == size_of_model(model).parameters
        assert type(plan.config) is type(model.config)
    return model, run


STEPS = {
    "ffn": llmlite.PruneFfn(keep=0.5, multiple_of=16),
    "heads": llmlite.PruneHeads(keep=0.5),
    "query heads": llmlite.PruneHeads(keep=0.5, unit="query_heads"),
    "layers": llmlite.PruneLayers(keep=0.67, candidates=2, greedy_windows=2),
    "hidden": llmlite.PruneHidden(keep=0.75, multiple_of=16),
    "structured": llmlite.PruneStructured(keep_parameters=0.6, multiple_of=8, spread="auto"),
    "weights": llmlite.PruneWeights(sparsity="2:4"),
}
NEEDS_HEADS = ("heads", "query heads", "hidden")


def fits(name: str, kind: str) -> bool:
    return kind not in NEEDS_HEADS or name in HEAD_FAMILIES


def test_live_equals_reloaded_by_stock_code_in_a_fresh_process_for_every_family(tmp_path: Path) -> None:
    models = {}
    for name in ALL_FAMILIES:
        kinds = [kind for kind in ("layers", "ffn", "heads", "hidden", "weights") if fits(name, kind)]
        models[name] = build_tiny(name)
        for kind in kinds:
            models[name] = STEPS[kind].apply(models[name], run_of(models[name].config))
    require_stock_reload(models, tmp_path)


@pytest.mark.parametrize("kind", STEPS)
def test_what_comes_out_is_what_the_plan_said_in_every_family(kind: str) -> None:
    for name in ALL_FAMILIES:
        if fits(name, kind):
            prune(build_tiny(name), STEPS[kind])  # holds the plan against the result


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_cutting_nothing_is_the_identity_bit_for_bit(name: str) -> None:
    model = build_tiny(name)
    before, everything = logits_of(model), {"keep": 1.0}
    kinds = (llmlite.PruneFfn, llmlite.PruneHeads, llmlite.PruneLayers, llmlite.PruneHidden)
    for step in (*(kind(**everything) for kind in kinds), llmlite.PruneWeights(sparsity=0.0), llmlite.PruneStructured(keep_parameters=1.0)):
        model = step.apply(model, run_of(model.config))
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_generating_with_a_cache_equals_generating_without(name: str) -> None:
    kinds = ["ffn", "layers", *(["query heads"] if name in HEAD_FAMILIES else [])]
    small = build_tiny(name)
    for kind in kinds:
        small = STEPS[kind].apply(small, run_of(small.config))
    ids = token_ids(1, 6)
    texts = [small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None) for cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["ffn", "heads", "query heads"])
@pytest.mark.parametrize("score", ["flap", "wanda", "magnitude", "taylor", "fisher", "obs"])
def test_without_repair_the_result_is_the_model_with_the_units_masked(kind: str, score: str) -> None:
    require_masked("qwen3", kind, score)


def test_what_neither_repairs_nor_listens_reads_no_more_text_than_its_score_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[int] = []
    real = units.walk_blocks
    monkeypatch.setattr(units, "walk_blocks", lambda model, batches, *rest: walked.append(len(batches)) or real(model, batches, *rest))
    for score, batches, tokens in (("wanda", 16, True), ("taylor", 0, True), ("magnitude", 0, False)):
        step, config = llmlite.PruneFfn(keep=0.5, multiple_of=16, score=score, reconstruct=False), tiny_config("llama")
        plan = step.check(ModelPlan(config), run_of(config))
        assert (plan.tokens > 0) == tokens
        _, run = prune(build_tiny("llama"), step)
        assert bool(walked.pop()) == bool(batches)
        assert ("relative_output_error" in run.notes["ffn"]) == bool(batches)
    run = run_of(config)
    del run.__dict__["calibration_windows"]
    monkeypatch.setattr("llmlite.calibration.sources.calibration_windows", lambda *_args: pytest.fail("magnitude asks for text"))
    step.apply(build_tiny("llama"), run)
    assert llmlite.PruneFfn(keep=0.5, multiple_of=16, score="magnitude", reconstruct=True).listens


@pytest.mark.parametrize("name", [name for name in ALL_FAMILIES if name not in ("qwen3", "olmo2")])
def test_pruned_equals_masked_in_every_family(name: str) -> None:
    for kind in ("ffn", "heads", "query heads"):
        if fits(name, kind):
            require_masked(name, kind, "wanda")


def require_masked(name: str, kind: str, score: str) -> None:
    import dataclasses

    step = dataclasses.replace(STEPS[kind], score=score, reconstruct=False)
    model = build_tiny(name)
    masked = build_tiny(name)
    small, run = prune(model, step)
    (figures,) = run.notes.values()
    role, size = ("down", 1) if kind == "ffn" else ("o", 64 // figures["units"])
    for block, removed in zip(ModelView(masked).blocks, figures["removed"], strict=True):
        for unit in removed:
            block.linears[role].weight_OI[:, unit * size : (unit + 1) * size] = 0
    torch.testing.assert_close(logits_of(small), logits_of(masked), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2", "opt"])
def test_repair_lowers_the_output_error_of_every_layer_that_hears_the_dense_model(name: str) -> None:
    options: dict[str, Any] = {"keep": 0.5, "multiple_of": 16, "inputs": "dense", "score": "wanda"}
    errors = []
    for reconstruct in (True, False):
        _, run = prune(build_tiny(name), llmlite.PruneFfn(reconstruct=reconstruct, **options))
        errors.append(run.notes["ffn"]["relative_output_error"])
    assert all(repaired < plain for repaired, plain in zip(*errors, strict=True))


def test_bias_compensation_needs_a_family_with_an_output_bias() -> None:
    step = llmlite.PruneFfn(keep=0.5, multiple_of=16, reconstruct=False, bias_compensation=True)
    for name in ("llama", "gpt2"):
        small, _ = prune(build_tiny(name), step)
        assert ModelView(small).blocks[0].linears["down"].bias is not None
    config = tiny_config("mistral")  # with its sliding window there is no equivalent family
    with pytest.raises(ConfigError, match="no bias at the FFN output"):
        step.check(ModelPlan(config), run_of(config))


def prune_with_bias(model: PreTrainedModel) -> tuple[Any, Run]:
    run = run_of(model.config)
    return llmlite.PruneFfn(keep=0.5, multiple_of=16, reconstruct=False, bias_compensation=True).apply(model, run), run


def test_the_first_layers_output_keeps_its_mean_with_bias_compensation() -> None:
    def output(model: PreTrainedModel) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = ModelView(model).blocks[0].linears["down"].module.register_forward_hook(lambda _m, _a, out: seen.append(out))
        logits_of(model, token_ids(16, 24, seed=3))
        handle.remove()
        return seen[0].flatten(0, 1).mean(0)

    dense = output(build_tiny("llama"))
    torch.testing.assert_close(output(prune_with_bias(build_tiny("llama"))[0]), dense, rtol=1e-3, atol=1e-3)


# heads --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED_HEAD_FAMILIES)
def test_families_that_cannot_lose_heads_say_what_to_do_instead(name: str) -> None:
    with pytest.raises(ConfigError, match=r"prune\.ffn"):
        STEPS["query heads"].check(ModelPlan(tiny_config(name)), run_of(tiny_config(name)))


def test_heads_that_llama_refuses_are_written_as_mistral_and_the_plan_says_so() -> None:
    config = tiny_config("llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    plan = llmlite.PruneHeads(keep=0.75).check(ModelPlan(config), run_of(config))
    assert plan.config.model_type == "mistral"
    assert any("mistral" in note for note in plan.notes)


def test_where_no_equivalent_helps_the_nearest_legal_number_of_heads_is_taken() -> None:
    config = tiny_config("gemma2", num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    plan = llmlite.PruneHeads(keep=0.75).check(ModelPlan(config), run_of(config))
    assert plan.config.num_attention_heads == 4  # 6 does not divide the hidden size of 64, nor do 5 and 7
    run = run_of(config)
    model = llmlite.PruneHeads(keep=0.75).apply(build_tiny("gemma2", num_attention_heads=8, num_key_value_heads=8, head_dim=8), run)
    assert model.config.num_attention_heads == 4


# layers -------------------------------------------------------------------------------------------------------------------------------


def test_a_layer_that_does_nothing_goes_first() -> None:
    model = build_tiny("llama")
    for role in ("o", "down"):
        ModelView(model).blocks[1].linears[role].weight_OI.zero_()
    before = logits_of(model)
    small, run = prune(model, llmlite.PruneLayers(keep=0.67, score="block_influence"))
    assert run.notes["removed_layers"] == [1]
    torch.testing.assert_close(logits_of(small), before)


def test_a_greedy_search_that_was_stopped_goes_on_behind_its_last_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, measured = build_tiny("qwen2"), token_ids(4, 24), []

    def counted(*args: Any) -> float:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(tuple(args[2]))
        return calibration_loss(*args)

    influence, file = influences(model, ids), tmp_path / "greedy.json"
    whole = greedy_layers(model, ids, 2, influence, 3)
    monkeypatch.setattr("llmlite.pruning.layers.calibration_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        greedy_layers(model, ids, 2, influence, 3, file)
    first = list(measured)
    measured.clear()
    assert greedy_layers(model, ids, 2, influence, 3, file) == whole
    assert not set(measured) & set(first)
    assert len(measured) == 1


@pytest.mark.parametrize("spread", ["measured", "query_heads+ffn"])
@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_a_run_that_is_stopped_behind_its_backward_passes_does_not_go_backward_again(
    score: Any, spread: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = llmlite.PruneStructured(keep_parameters=0.7, multiple_of=8, spread=spread, score=score, head_score=score)
    backward, real, passes = torch.Tensor.backward, units.walk_blocks, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *args, **options: passes.append(1) or backward(self, *args, **options))

    def pruned(scratch: Path, seed: int = 3) -> tuple[Any, int]:
        run = run_of(tiny_config("qwen2"), token_ids(16, 24, seed=seed))
        run.scratch = scratch
        passes.clear()
        return step.apply(build_tiny("qwen2"), run), len(passes)

    whole, calls = pruned(tmp_path / "whole")
    assert calls > 0
    monkeypatch.setattr(units, "walk_blocks", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pruned(tmp_path / "stopped")
    monkeypatch.setattr(units, "walk_blocks", real)
    again, calls = pruned(tmp_path / "stopped")
    assert calls == 0
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert pruned(tmp_path / "stopped", seed=4)[1] > 0  # another text


def test_greedy_takes_the_layer_whose_absence_costs_least_of_those_tried() -> None:
    model, ids = build_tiny("qwen2"), token_ids(4, 24)
    influence = influences(model, ids)
    assert all(0 <= value <= 2 for value in influence)
    removed, losses = greedy_layers(model, ids, 2, influence, candidates=3)
    one = {index: calibration_loss(model, ids, [index]) for index in range(3)}
    assert removed[0] == min(one, key=one.__getitem__)
    assert losses[0] == pytest.approx(one[removed[0]])
    assert len(set(removed)) == 2


def test_smollm3_keeps_its_layers_or_says_why() -> None:
    config = tiny_config("smollm3")
    plan = STEPS["layers"].check(ModelPlan(config), run_of(config))
    assert plan.config.num_hidden_layers == 2


# weights ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_patterns_hold_in_every_projection_of_every_family(name: str) -> None:
    for pattern, zeros, group in (("2:4", 2, 4), ("4:8", 4, 8)):
        model, run = prune(build_tiny(name), llmlite.PruneWeights(sparsity=pattern))
        assert all(follows_pattern(linear.weight_OI, zeros, group) for linear in ModelView(model).linears())
        assert run.notes["sparsity"] == 0.5


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_owl_moves_zeros_between_layers_and_keeps_their_number(name: str, method: str) -> None:
    model, run = prune(build_tiny(name), llmlite.PruneWeights(sparsity=0.5, method=method, allocation="owl", outlier_factor=3, allocation_reach=0.2))
    assert count_zeros(model).sparsity == pytest.approx(0.5, abs=0.01)
    by_block = [0.0] * 3
    for linear in ModelView(model).linears():
        by_block[linear.block] += float((linear.weight_OI == 0).sum()) / sum(other.weight_OI.numel() for other in ModelView(model).blocks[0].linears.values())
    assert by_block == pytest.approx(run.notes["layer_sparsity"], abs=0.01)
    assert max(by_block) - min(by_block) == pytest.approx(0.4, abs=0.02)
    assert by_block.index(min(by_block)) == run.notes["outliers"].index(max(run.notes["outliers"]))


def test_owl_is_refused_where_it_has_no_room() -> None:
    config = tiny_config("llama")
    for sparsity in ("2:4", 0.95, 0.1):
        with pytest.raises(ConfigError, match="allocation: uniform"):
            llmlite.PruneWeights(sparsity=sparsity, allocation="owl").check(ModelPlan(config), run_of(config))


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "gemma3_text"])
def test_patterns_hold_in_every_projection_and_shares_are_those_asked_for(name: str, method: str) -> None:
    model, _ = prune(build_tiny(name), llmlite.PruneWeights(sparsity="2:4", method=method))
    assert all(follows_pattern(linear.weight_OI, 2, 4) for linear in ModelView(model).linears())
    model, run = prune(build_tiny(name), llmlite.PruneWeights(sparsity=0.25, method=method))
    assert count_zeros(model).sparsity == pytest.approx(0.25, abs=0.01)
    assert run.notes["zeros"] == count_zeros(model).zeros


def test_sparsegpt_leaves_a_better_model_than_magnitude() -> None:
    ids = token_ids(16, 24, seed=3)
    dense = logits_of(build_tiny("llama"), ids)
    errors = {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        model, _ = prune(build_tiny("llama"), llmlite.PruneWeights(sparsity=0.5, method=method))
        errors[method] = float((logits_of(model, ids) - dense).square().mean())
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_tokens_count_by_their_sensitivity_where_asked_for(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pruned(token_weights: str) -> torch.Tensor:
        model, _ = prune(build_tiny("llama"), llmlite.PruneWeights(method=method, token_weights=token_weights))
        return torch.cat([linear.weight_OI.flatten() for linear in ModelView(model).linears()])

    equal, weighted = pruned("equal"), pruned("sensitivity")
    assert not torch.equal(equal, weighted)
    assert (weighted == 0).float().mean() == pytest.approx(0.5, abs=0.01)

    def ones(model: Any, batches: Any, places: Any, seed: int, state: Any = None) -> list[dict[str, torch.Tensor]]:
        return [{linear.name: torch.ones(batches[place]["input_ids"].numel()) for linear in ModelView(model).linears()} for place in places]

    monkeypatch.setattr("llmlite.calibration.sensitivity.quick_sensitivity", ones)
    assert torch.equal(pruned("sensitivity"), equal)


def test_a_pattern_that_does_not_divide_is_refused_at_check_time() -> None:
    config = tiny_config("llama", intermediate_size=126)
    with pytest.raises(ConfigError, match=r"down_proj \(126\).* no multiple of 4"):
        llmlite.PruneWeights(sparsity="2:4").check(ModelPlan(config), run_of(config))
    for wrong in ("4:2", "half", 1.0, -0.1):
        with pytest.raises(ConfigError, match="sparsity"):
            llmlite.PruneWeights(sparsity=wrong)


def test_the_form_after_zeros_is_sparse_and_structured_pruning_still_takes_it() -> None:
    config = tiny_config("llama")
    plan = llmlite.PruneWeights().check(ModelPlan(config), run_of(config))
    assert plan.form == "sparse"
    assert plan.form in llmlite.PruneFfn.takes
    assert STEPS["ffn"].check(plan, run_of(config)).form == "sparse"


def test_adapters_are_refused() -> None:
    for step in STEPS.values():
        with pytest.raises(ConfigError, match="adapter"):
            step.check(ModelPlan(tiny_config("llama"), adapters=True), run_of(tiny_config("llama")))


# a share of parameters ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "keep"), [("auto", 0.8), ("auto", 0.6), ("ffn", 0.8), ("query_heads+ffn", 0.8)])
def test_the_share_of_the_decoder_asked_for_is_what_stays(spread: str, keep: float) -> None:
    config = tiny_config("mistral", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, intermediate_size=512, head_dim=8)
    model = build_tiny("mistral", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, intermediate_size=512, head_dim=8)
    dense = size_of_model(model).decoder
    small, _ = prune(model, llmlite.PruneStructured(keep_parameters=keep, multiple_of=2, spread=spread))
    assert size_of_model(small).decoder / dense == pytest.approx(keep, abs=0.005)
    cuts, _ = allocate(config, keep, 2, spread)
    assert any(cut.kind == "query_heads" for cut in cuts) == (spread == "query_heads+ffn")


def test_a_share_that_no_width_reaches_is_refused() -> None:
    config = tiny_config("llama")
    with pytest.raises(ConfigError, match="cannot be reached by layers, heads"):
        llmlite.PruneStructured(keep_parameters=0.1).check(ModelPlan(config), run_of(config))
    with pytest.raises(ConfigError, match=r"prune\.layers"):
        llmlite.PruneStructured(keep_parameters=0.1, spread="ffn").check(ModelPlan(config), run_of(config))


def test_a_repaired_model_reads_better_than_an_unrepaired_one() -> None:
    ids = token_ids(16, 24, seed=3)
    batches = [{"input_ids": ids, "labels": ids}]
    dense = logits_of(build_tiny("llama"), ids)
    errors = []
    for reconstruct in (True, False):
        small, _ = prune(build_tiny("llama"), llmlite.PruneFfn(keep=0.5, multiple_of=16, reconstruct=reconstruct))
        errors.append(float((logits_of(small, ids) - dense).square().mean()))
        assert measure_quality(small, batches).perplexity > 1
    assert errors[0] < errors[1]
