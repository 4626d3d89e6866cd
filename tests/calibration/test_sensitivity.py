"""How much tokens count: gradients by the model's own labels, and the weighted sums that the walk makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmlite.calibration.blocks import Blocks, batches_of
from llmlite.calibration.sensitivity import OwnLabels, cost_of_changes, cost_of_silence, quick_sensitivity, token_sensitivity
from llmlite.errors import RunError
from llmlite.models.view import ModelView
from tests.conftest import build_tiny, token_ids


def test_own_labels_are_drawn_as_often_as_the_model_says() -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(5)
    tokens = 20_000
    uniform_N = (torch.arange(tokens) + 0.5) / tokens  # every quantile once
    (loss_N,) = OwnLabels(uniform_N).values(logits_V.expand(tokens, 5).clone(), uniform_N)
    entropy = -(logits_V.log_softmax(-1) * logits_V.softmax(-1)).sum()
    assert loss_N.mean().item() == pytest.approx(entropy.item(), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_sensitivity_is_the_squared_gradient_of_the_loss_at_each_output(family: str) -> None:
    model = build_tiny(family)
    batches = batches_of(token_ids(rows=4, length=16, seed=1))
    found = token_sensitivity(model, batches, [1], seed=3)[0]
    linears = list(ModelView(model).linears())
    assert found.keys() == {linear.name for linear in linears}
    # the slow way: the same labels, plain logits, one gradient by a shift of the output at every token
    linear = linears[-1]
    uniform_N = torch.rand(16, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1))
    shift = torch.zeros(16, linear.out_features, requires_grad=True)
    handle = linear.module.register_forward_hook(lambda _module, _args, output: output + shift.view(output.shape))
    logits_NV = model(**batches[1]).logits.flatten(0, 1)
    handle.remove()
    (loss_N,) = OwnLabels(uniform_N).values(logits_NV, uniform_N)
    (grad,) = torch.autograd.grad(loss_N.sum(), shift)
    torch.testing.assert_close(found[linear.name], grad.square().sum(-1), rtol=1e-3, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_cost_of_a_change_is_the_divergence_it_causes() -> None:
    model = build_tiny("llama")
    batches = batches_of(token_ids(rows=64, length=32, seed=1))
    last = list(ModelView(model).linears())[-1]  # behind it tokens do nothing to one another, so that the figure is exact to second order
    change_OI = 0.02 * torch.randn(last.weight_OI.shape, generator=torch.Generator().manual_seed(0))
    found = cost_of_changes(model, batches, {last.name: change_OI}, seed=1)
    assert found.keys() == {last.name}
    with torch.no_grad():
        before = [model(**batch).logits.log_softmax(-1) for batch in batches]
        last.weight_OI.add_(change_OI)
        after = [model(**batch).logits.log_softmax(-1) for batch in batches]
    kl = torch.stack([(one.exp() * (one - other)).sum(-1).mean() for one, other in zip(before, after, strict=True)]).mean()
    assert found[last.name] == pytest.approx(float(kl), rel=0.15)  # the labels are drawn


@pytest.mark.parametrize(("family", "role", "units"), [("llama", "down", None), ("llama", "o", 4), ("gpt2", "down", 8)])
def test_the_cost_of_silence_is_its_formula_token_by_token(family: str, role: str, units: int | None) -> None:
    model = build_tiny(family)
    batches = batches_of(token_ids(rows=4, length=16, seed=1))
    linear = ModelView(model).blocks[0].linears[role]
    units = units or linear.in_features
    found = cost_of_silence(model, batches, [(linear.name, units)], seed=3)
    inputs, grads = [], []
    for place, batch in enumerate(batches):
        uniform_N = torch.rand(16, generator=torch.Generator().manual_seed(3 * 1_000_003 + place))
        heard: list[Tensor] = []

        def listen(_module: object, args: tuple[Tensor, ...], heard: list[Tensor] = heard) -> tuple[Tensor, ...]:
            heard.append(args[0].detach().requires_grad_())
            return (heard[0],)

        handle = linear.module.register_forward_pre_hook(listen)
        logits_NV = model(**batch).logits.flatten(0, 1)
        handle.remove()
        (loss_N,) = OwnLabels(uniform_N).values(logits_NV, uniform_N)
        grads.append(torch.autograd.grad(loss_N.sum(), heard[0])[0].flatten(0, -2))
        inputs.append(heard[0].detach().flatten(0, -2))
    x_NI, g_NI = torch.cat(inputs), torch.cat(grads)
    change_NU = ((x_NI - x_NI.mean(0)) * g_NI).unflatten(-1, (units, -1)).sum(-1)
    torch.testing.assert_close(found[linear.name, units], change_NU.square().sum(0) / (2 * len(x_NI)), rtol=1e-3, atol=1e-9)


def test_labels_of_a_batch_do_not_depend_on_who_reads_the_others() -> None:
    model, batches = build_tiny("llama"), batches_of(token_ids(rows=8, length=16, seed=1))
    whole, part = token_sensitivity(model, batches, [0, 1, 2, 3]), token_sensitivity(model, batches, [2])
    for name, weight_N in part[0].items():
        assert torch.equal(weight_N, whole[2][name])


def test_weighted_sums_are_those_of_scaled_tokens_and_shared_inputs_add_their_weights() -> None:
    model, batches = build_tiny("llama"), batches_of(token_ids(rows=4, length=16, seed=1))
    blocks = Blocks(model, batches)
    block = blocks.view.blocks[0]
    names = {role: linear.name for role, linear in block.linears.items()}
    weights = [{name: torch.rand(batch["input_ids"].numel()) for name in names.values()} for batch in batches]
    found = blocks.collect(block, ["q", "k", "v", "down"], weights=weights)
    inputs: dict[str, list[Tensor]] = {"q": [], "down": []}
    for index, hidden in enumerate(blocks.hidden):
        for role, x in blocks._inputs(block, list(inputs), index, hidden).items():
            inputs[role].append(x.flatten(0, 1))
    for role, sharing in (("q", "qkv"), ("down", ["down"])):
        weight_N = torch.cat([sum((one[names[other]] for other in sharing), torch.zeros(1)) for one in weights])
        x_NI = torch.cat(inputs[role])
        expected_II = (x_NI * (0.5 + 0.5 * weight_N / weight_N.mean())[:, None]).t() @ x_NI
        torch.testing.assert_close(found[role].all.gram_II, expected_II, rtol=1e-4, atol=1e-4)
    assert found["q"] is found["k"]
    assert found["q"] is found["v"]


def test_inputs_that_are_no_numbers_are_refused_with_the_name_of_the_layer() -> None:
    model = build_tiny("llama")
    stream = Blocks(model, batches_of(token_ids()))
    stream.hidden[0][0, 3] = torch.nan
    with pytest.raises(RunError, match=r"block 0 gives model.layers.0.self_attn.q_proj inputs that are infinite or no numbers"):
        stream.collect(stream.view.blocks[0], ("q",))


def test_equal_weights_change_nothing() -> None:
    model, batches = build_tiny("llama"), batches_of(token_ids(rows=4, length=16, seed=1))
    blocks = Blocks(model, batches)
    block = blocks.view.blocks[1]
    alike = [{linear.name: torch.full((batch["input_ids"].numel(),), 7.0) for linear in block.linears.values()} for batch in batches]
    weighted, plain = blocks.collect(block, ["o"], weights=alike), blocks.collect(block, ["o"])
    torch.testing.assert_close(weighted["o"].all.gram_II, plain["o"].all.gram_II)


def test_a_pass_that_is_stopped_goes_on_behind_its_last_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlite.calibration import sensitivity as module

    model = build_tiny("llama")
    batches = batches_of(token_ids(rows=8, length=16, seed=1))
    whole = quick_sensitivity(model, batches, [0, 1, 2, 3], 3)
    real, read = module.token_sensitivity, []

    def dies(model: Any, batches: Any, places: list[int], seed: int) -> Any:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.extend(places)
        return real(model, batches, places, seed)

    with monkeypatch.context() as patch:
        patch.setattr(module, "token_sensitivity", dies)
        with pytest.raises(KeyboardInterrupt):
            quick_sensitivity(model, batches, [0, 1, 2, 3], 3, tmp_path)
    monkeypatch.setattr(module, "token_sensitivity", lambda *args: (read.extend(args[2]), real(*args))[1])
    found = quick_sensitivity(model, batches, [0, 1, 2, 3], 3, tmp_path)
    assert read == [0, 1, 2, 3]
    for one, other in zip(found, whole, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    quick_sensitivity(model, batches, [2], 4, tmp_path)  # other labels are another pass
    assert read == [0, 1, 2, 3, 2]
