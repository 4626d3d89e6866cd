"""First-order scores against the slicer: a unit is worth what the weights that go with it are worth."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from llmlite.models.slicing import take_ffn_channels, take_kv_groups, take_query_heads
from llmlite.models.view import ModelView
from llmlite.pruning.taylor import taylor_scores
from tests.conftest import ALL_FAMILIES, HEAD_FAMILIES, build_tiny, token_ids

TAKE = {"ffn": take_ffn_channels, "kv_groups": take_kv_groups, "query_heads": take_query_heads}


def elements(model: PreTrainedModel, ids_NT: torch.Tensor) -> PreTrainedModel:
    """The model with |W * dL/dW| in place of each projection's weight, in the plainest way."""
    worth = build_tiny(model.config.model_type)
    worth.load_state_dict(model.state_dict())
    model.requires_grad_(True)
    for ids_T in ids_NT:
        model(input_ids=ids_T[None], labels=ids_T[None]).loss.backward()
    with torch.no_grad():
        for there, here in zip(ModelView(worth).linears(), ModelView(model).linears(), strict=True):
            there.base.weight.copy_((here.base.weight * here.base.weight.grad).abs())
    model.zero_grad()
    return worth


def total(state: dict[str, torch.Tensor], view: ModelView, block: int) -> float:
    return sum(float(state[f"{linear.name}.weight"].double().sum()) for linear in view.blocks[block].linears.values())


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in ALL_FAMILIES for kind in TAKE if kind == "ffn" or name in HEAD_FAMILIES])
def test_a_unit_is_worth_what_the_slicer_takes_with_it(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.pruning.taylor.quickened", lambda model: model)
    model, ids_NT = build_tiny(name), token_ids(2, 12)
    view = ModelView(model)
    units = {"ffn": view.ffn_channels, "kv_groups": view.kv_heads, "query_heads": view.heads}[kind]
    found = taylor_scores(model, ids_NT, {kind: units})
    worth = ModelView(elements(model, ids_NT))
    whole = total({key: value.detach() for key, value in worth.model.state_dict().items()}, worth, 0)
    # query heads go evenly from every group: the slicer takes one of each, and the scores of those are compared together
    groups = view.kv_heads if kind == "query_heads" and view.heads > view.kv_heads else 1
    for member in {0, units // groups - 1}:
        gone = [group * (units // groups) + member for group in range(groups)]
        kept = [unit for unit in range(units) if unit not in gone]
        _, state = TAKE[kind](worth, [kept] * len(worth.blocks))
        assert float(found[kind, 0][gone].sum()) == pytest.approx(whole - total(state, worth, 0), rel=1e-4)
    assert len(found) == len(view.blocks)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_quickest_type_finds_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_NT = build_tiny("llama"), token_ids(2, 12)
    quick = taylor_scores(model, ids_NT, {"ffn": 128})
    monkeypatch.setattr("llmlite.pruning.taylor.quickened", lambda model: model)
    for key, score_U in taylor_scores(model, ids_NT, {"ffn": 128}).items():
        assert torch.corrcoef(torch.stack([score_U, quick[key]]))[0, 1] > 0.999
