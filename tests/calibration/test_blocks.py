"""The walk sees what the stock forward pass sees, counts no padding, and goes on where it was stopped."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmlite.calibration.blocks import Blocks, Statistics, batches_of, skipping
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.models.view import BlockView, ModelView
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, token_ids

ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")


def padded() -> dict[str, torch.Tensor]:
    ids, mask = token_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, 12:], ids[1, 12:] = 0, 0
    mask[2, 5:], ids[2, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_hidden_states_on_the_walk_are_those_of_the_stock_forward_pass(name: str) -> None:
    model = build_tiny(name)
    for batch in ({"input_ids": token_ids()}, padded()):
        with torch.no_grad():
            expected = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        stream = Blocks(model, [batch])
        for block in stream.view.blocks:
            assert torch.equal(stream.hidden[0], expected[block.index])
            stream.advance(block)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_statistics_count_every_real_token_once_and_no_padding(name: str) -> None:
    model = build_tiny(name)
    batch = padded()
    rows = [{"input_ids": row[: int(mask.sum())][None]} for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    together, alone = Blocks(model, [batch]), Blocks(model, rows)
    for block in together.view.blocks:
        padded_sums, plain_sums = together.collect(block, ROLES, dtype=torch.float64), alone.collect(block, ROLES, dtype=torch.float64)
        assert padded_sums.keys() == plain_sums.keys() == block.linears.keys()
        for role, found in padded_sums.items():
            assert found.all.tokens == plain_sums[role].all.tokens == 20 + 12 + 5
            torch.testing.assert_close(found.all.gram_II, plain_sums[role].all.gram_II, rtol=1e-3, atol=1e-3)
        together.advance(block)
        alone.advance(block)


def test_the_order_of_the_rows_does_not_matter_and_one_batch_of_four_is_held_out() -> None:
    model, ids = build_tiny("llama"), token_ids(8)
    ordered, shuffled = (Blocks(model, batches_of(rows)) for rows in (ids, ids[torch.randperm(8)]))
    block = ordered.view.blocks[0]
    one, other = ordered.collect(block, ("down",))["down"], shuffled.collect(block, ("down",))["down"]
    torch.testing.assert_close(one.all.gram_II, other.all.gram_II, rtol=1e-5, atol=1e-4)
    assert one.held is not None
    assert (one.fit.tokens, one.held.tokens) == (6 * 20, 2 * 20)


def test_projections_that_hear_the_same_share_their_sums() -> None:
    stream = Blocks(build_tiny("llama"), [{"input_ids": token_ids()}])
    found = stream.collect(stream.view.blocks[0], ROLES)
    assert found["q"] is found["k"] is found["v"]
    assert found["gate"] is found["up"]
    assert found["o"] is not found["q"]


def test_skipping_blocks_is_skipping_them_and_ends() -> None:
    model = build_tiny("gemma3_text")
    before = logits_of(model)
    with skipping(ModelView(model).blocks[1:]):
        with torch.no_grad():
            states = model(input_ids=token_ids(), output_hidden_states=True, use_cache=False).hidden_states
        assert not torch.equal(logits_of(model), before)
    assert len(states) >= 2
    assert torch.equal(logits_of(model), before)


# walks --------------------------------------------------------------------------------------------------------------------------------


def halve(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
    """A change that depends on the statistics."""
    for role, statistics in found.items():
        weight = block.linears[role].weight_OI
        weight *= (statistics.all.norm_I > statistics.all.norm_I.median()).to(weight.dtype)
    return {role: float(statistics.all.norm_I.sum()) for role, statistics in found.items()}


@pytest.mark.parametrize("walk", [Walk((("down",),)), Walk((("o",), ("down",)), target="dense"), Walk((("o",), ("down",)), inputs="dense")], ids=str)
def test_a_walk_that_is_stopped_goes_on_behind_the_last_complete_block(walk: Walk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batches = build_tiny("gemma2"), batches_of(token_ids(8))
    whole = copy.deepcopy(model)
    notes = walk_blocks(whole, batches, walk, halve)

    def killed(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
        if block.index == 2:
            raise KeyboardInterrupt
        return halve(block, found)

    def later_only(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
        assert block.index == 2
        return halve(block, found)

    with pytest.raises(KeyboardInterrupt):
        walk_blocks(copy.deepcopy(model), batches, walk, killed, tmp_path)
    resumed = copy.deepcopy(model)
    assert walk_blocks(resumed, batches, walk, later_only, tmp_path) == notes
    assert torch.equal(logits_of(resumed), logits_of(whole))
    # a block whose state was damaged is done again, and said to be
    assert "damaged" not in caplog.text
    (tmp_path / "block-002" / "notes.json").write_text("{")
    again = copy.deepcopy(model)
    assert walk_blocks(again, batches, walk, later_only, tmp_path) == notes
    assert "block-002 is damaged (notes.json has 1 bytes instead of" in caplog.text


def inputs_seen(model: PreTrainedModel, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits_of(model, token_ids(8))
    handle.remove()
    return seen[0].flatten(0, 1)


def test_compressed_inputs_come_from_the_changed_prefix_and_dense_ones_from_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.calibration.blocks.quick_dtype", lambda device, own: own)
    grams: dict[str, torch.Tensor] = {}
    models = {}
    for kind in ("compressed", "dense"):

        def change(block: BlockView, found: dict[str, Statistics], kind: str = kind) -> Mapping[str, Any]:
            grams[kind] = found["down"].all.gram_II
            if block.index < 2:
                block.linears["down"].weight_OI.mul_(0.5)
            return {}

        models[kind] = build_tiny("llama")
        walk_blocks(models[kind], batches_of(token_ids(8)), Walk((("down",),), inputs=kind), change)
    for kind, model in (("compressed", models["compressed"]), ("dense", build_tiny("llama"))):
        x = inputs_seen(model, "model.layers.2.mlp.down_proj")
        torch.testing.assert_close(grams[kind], x.T @ x, rtol=1e-4, atol=1e-3)


def test_a_quick_walk_hears_nearly_the_same_and_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    grams = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("llmlite.calibration.blocks.quick_dtype", lambda device, own, dtype=dtype: dtype)

        def change(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
            grams.append(found["down"].all.gram_II)
            return {}

        model = build_tiny("llama")
        before = logits_of(model)
        walk_blocks(model, batches_of(token_ids(8)), Walk((("down",),), inputs="dense"), change)
        assert torch.equal(logits_of(model), before)
    blocks = len(grams) // 2
    for exact_II, quick_II in zip(grams[:blocks], grams[blocks:], strict=True):
        assert quick_II.dtype == torch.float32
        assert not torch.equal(quick_II, exact_II)
        assert torch.dist(quick_II, exact_II) < 0.05 * exact_II.norm()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_attention_that_does_not_change_is_not_computed_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
        for role in found:
            block.linears[role].weight_OI.mul_(0.9)
        return {role: float(statistics.all.gram_II.sum()) for role, statistics in found.items()}

    walk = Walk((("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up"), ("down",)))
    made, notes, calls = [], [], []
    for remembers in (True, False):
        model = build_tiny(family)
        if not remembers:
            monkeypatch.setattr("llmlite.calibration.attention.KnownAttention.works", lambda *_: False)
        count = [0]
        linears = ModelView(model).blocks[-1].linears
        (linears.get("q") or linears["qkv"]).module.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        notes.append(walk_blocks(model, batches_of(token_ids(8)), walk, change))
        made.append(logits_of(model))
        calls.append(count[0])
    assert torch.equal(made[0], made[1])
    assert notes[0] == notes[1]
    assert calls[0] < calls[1]


def test_with_the_dense_target_cross_moments_join_the_two_streams() -> None:
    seen = {}

    def change(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
        seen[block.index] = found["down"].all
        block.linears["down"].weight_OI.mul_(0.5)
        return {}

    model = build_tiny("llama")
    walk_blocks(model, batches_of(token_ids(8)), Walk((("down",),), target="dense"), change)
    name = "model.layers.2.mlp.down_proj"
    ours, theirs = inputs_seen(model, name), inputs_seen(build_tiny("llama"), name)
    torch.testing.assert_close(seen[2].target_JI, theirs.T @ ours, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(seen[0].target_JI, seen[0].gram_II)


_TWO = """
import json, sys
import torch
import torch.distributed as dist
import llmlite
from llmlite.calibration.blocks import Blocks, batches_of
from llmlite.calibration.walk import Walk, walk_blocks
from llmlite.calibration.moments import Moments
from llmlite.pruning.layers import influences
from tests.conftest import build_tiny, logits_of, token_ids
from tests.pruning.test_steps import run_of

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
ids = token_ids(20, 16)

def everything():
    stream, found = Blocks(build_tiny("qwen2"), batches_of(ids)), {}
    for block in stream.view.blocks:
        for role, statistics in stream.collect(block, ("o", "down")).items():
            found[f"{block.index} {role} fit"], found[f"{block.index} {role} held"] = statistics.fit.gram_II, statistics.held.gram_II
            found[f"{block.index} {role} tokens"] = torch.tensor([statistics.fit.tokens, statistics.held.tokens])
        stream.advance(block)
    found["influence"] = torch.tensor(influences(build_tiny("qwen2"), ids))
    for name, step in {"ffn": llmlite.PruneFfn(keep=0.5, multiple_of=16, target="dense"), "weights": llmlite.PruneWeights(sparsity=0.5)}.items():
        run = run_of(build_tiny("qwen2").config, ids)
        found[name] = logits_of(step.apply(build_tiny("qwen2"), run))
    return stream, found

alone = everything()[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
whole, mine = Moments(5), Moments(5, cross=True)
whole.add(x)
mine.add(x[rank::2], x[rank::2])
mine.all_reduce()
torch.testing.assert_close(mine.gram_II, whole.gram_II)
torch.testing.assert_close(mine.cross_JI, whole.gram_II)
assert mine.tokens == 30
stream, together = everything()
assert stream.places == list(range(rank, 4, 2)) and len(stream.hidden) == 2
for name in alone:
    torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-3, msg=lambda text: f"{name}: {text}")

# one process has kept one block more than the other: both go on behind the one that both have
from pathlib import Path
seen = []
def change(block, found):
    seen.append(block.index)
    return {}
state = Path(folder) / str(rank)
walk_blocks(build_tiny("qwen2"), batches_of(ids), Walk((("down",),)), change, state)
if rank:
    (state / "block-001" / "notes.json").write_text("{")
seen.clear()
walk_blocks(build_tiny("qwen2"), batches_of(ids), Walk((("down",),)), change, state)
assert seen == [1, 2], seen
"""


def test_two_processes_share_the_batches_and_find_what_one_finds(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", _TWO, str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from llmlite.calibration.blocks import batches_of
from llmlite.calibration.walk import Walk, walk_blocks
from tests.calibration.test_blocks import halve
from tests.conftest import build_tiny, token_ids

def change(block, found):
    if block.index == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return halve(block, found)

torch.set_num_threads(1)
walk_blocks(build_tiny("llama", num_hidden_layers=30), batches_of(token_ids(8)), Walk((("down",),)), change, Path(sys.argv[1]))
"""


def test_a_process_that_is_killed_at_block_20_of_30_goes_on_at_block_20(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    whole, resumed, seen = build_tiny("llama", num_hidden_layers=30), build_tiny("llama", num_hidden_layers=30), []
    notes = walk_blocks(whole, batches_of(token_ids(8)), Walk((("down",),)), halve)

    def change(block: BlockView, found: dict[str, Statistics]) -> Mapping[str, Any]:
        seen.append(block.index)
        return halve(block, found)

    assert walk_blocks(resumed, batches_of(token_ids(8)), Walk((("down",),)), change, tmp_path) == notes
    assert seen == list(range(20, 30))
    assert torch.equal(logits_of(resumed), logits_of(whole))
