"""The walk: block by block, statistics of its projections, a change, and on to the next; kept on disk, so that a walk that was stopped goes on.

What runs the blocks and takes the statistics is `llmlite.calibration.blocks`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmlite.calibration.blocks import Batch, Blocks, Statistics
from llmlite.models.blockwise import present, replace, shelf_of
from llmlite.models.device_map import is_offloaded
from llmlite.models.view import BlockView
from llmlite.processes import least_over_processes, rank_and_processes
from llmlite.storage import damage, writing_folder

__all__ = ["Walk", "Weigh", "walk_blocks"]

log = logging.getLogger(__name__)

_BEFORE_O = frozenset({"q", "k", "v", "qkv"})

Change = Callable[[BlockView, "dict[str, Statistics]"], "Mapping[str, Any] | None"]
Weigh = Callable[[Sequence[int]], "Sequence[Mapping[str, Tensor]]"]


@dataclass(frozen=True)
class Walk:
    """How a walk goes.

    Attributes:
        stages: groups of roles of which statistics are taken together; each group sees the changes made after the one before.
        inputs: "compressed": every block hears what the changed blocks before it give; "dense": what the dense model would give, one pass cheaper.
        target: "own": repair towards the outputs that the present inputs give; "dense": towards the dense model's outputs, which also corrects for the
            blocks before and costs one more pass. Needs inputs "compressed".
        gram: whether the sums of products are wanted, or those of squares will do; the latter are much cheaper.
        keeps: whether weights change and are kept. False for walks that only look.
    """

    stages: Sequence[Sequence[str]] = field(default_factory=tuple)
    inputs: Literal["compressed", "dense"] = "compressed"
    target: Literal["own", "dense"] = "own"
    gram: bool = True
    keeps: bool = True


@torch.no_grad()
def walk_blocks(
    model: nn.Module, batches: Sequence[Batch], walk: Walk, change: Change, state: Path | None = None, weigh: Weigh | None = None
) -> list[dict[str, Any]]:
    """Visit all blocks in order; take statistics and let the caller change the block's weights in place.

    Args:
        model: a stock model, in eval mode; its weights are changed.
        batches: calibration inputs.
        walk: see `Walk`.
        change: called for each block and stage with the block and its statistics by role. It writes into the weights (`linear.weight_OI`, `linear.bias`)
            and returns plain values to remember, for instance which units stay.
        state: a folder; each block's changed weights are kept there, and a walk that was stopped goes on behind the last block that is complete. A model
            that is loaded block by block has its changed blocks there and nowhere else; of such a one all processes of a launch give the same folder, and the
            first of them writes. Of a whole model each gives a folder of its own.
        weigh: given the places of this process's batches, how much each token counts; see `Blocks.collect`. Called once, before anything changes.

    Returns:
        For each block what `change` returned, the stages merged.

    Raises:
        ValueError: changed blocks have nowhere to stay.
    """
    if state is None and walk.keeps and shelf_of(model) is not None:
        raise ValueError("a model that is loaded block by block needs a folder for its changed blocks (state)")
    if walk.keeps and is_offloaded(model):
        raise ValueError("changes to weights that device_map has offloaded would vanish; load the model whole, or with load: blocks")
    # a quick walk through changed weights would turn their last bits, which differ with the number of processes, into other choices
    stream = Blocks(model, batches, quick=walk.inputs == "dense")
    dense = list(stream.hidden) if walk.target == "dense" else None
    complete = _complete(stream, state)
    left = complete < len(stream.view.blocks)  # else nothing is heard any more
    weights = weigh(stream.places) if weigh is not None and left else None
    remembered: list[dict[str, Any]] = []
    for block in stream.view.blocks:
        folder = None if state is None else state / f"block-{block.index:03d}"
        done = block.index < complete
        if done and not remembered:
            log.info("continuing behind block %d", complete - 1)
        with present(block):
            if walk.inputs == "dense" and done and left:
                stream.advance(block)
            ahead = None if dense is None or not left else stream.through(block, dense)
            if done and folder is not None:
                remembered.append(_restore(block, folder))
            else:
                remembered.append(_visit(block, stream, walk, change, dense, weights))
                if folder is not None:
                    _keep(block, remembered[-1], folder, walk.keeps, shelf_of(model) is not None)
                log.info("block %d of %d", block.index + 1, len(stream.view.blocks))
            if walk.inputs != "dense" and left:
                stream.advance(block)
        if folder is not None and walk.keeps:
            replace(block, folder / "block.safetensors")
        if ahead is not None:
            dense = ahead
    return remembered


def _visit(
    block: BlockView, stream: Blocks, walk: Walk, change: Change, dense: list[Tensor] | None, weights: Sequence[Mapping[str, Tensor]] | None
) -> dict[str, Any]:
    """Statistics and change of one block, stage by stage; of a walk with dense inputs the stream is behind the block afterwards."""
    notes: dict[str, Any] = {}
    after: list[Tensor] | None = None
    for number, stage in enumerate(walk.stages):
        settled = walk.inputs == "compressed" and not any(role in _BEFORE_O for later in (stage, *walk.stages[number + 1 :]) for role in later)
        found = stream.collect(block, stage, dense=dense, weights=weights, gram=walk.gram, settled=settled)
        if walk.inputs == "dense" and after is None:
            after = stream.through(block, stream.hidden)
        notes |= change(block, found) or {}
        del found
    if after is not None:
        stream.hidden = after
    return notes


def _complete(stream: Blocks, state: Path | None) -> int:
    """Leading blocks that every process has kept whole."""
    found = 0
    while state is not None and found < len(stream.view.blocks):
        folder = state / f"block-{found:03d}"
        if reason := damage(folder):
            if folder.exists():
                log.warning("%s is damaged (%s); done again from there", folder.name, reason)
            break
        found += 1
    return least_over_processes(found, next(stream.view.embedding.parameters()).device)


def _keep(block: BlockView, notes: dict[str, Any], folder: Path, weights: bool, common: bool) -> None:
    """Write what becomes of a block; into a folder that is common to all processes the first one does, and the others wait for it."""
    rank, processes = rank_and_processes()
    if rank == 0 or not common:
        with writing_folder(folder) as temporary:
            if weights:
                save_file({name: parameter.detach().contiguous().cpu() for name, parameter in block.module.named_parameters()}, temporary / "block.safetensors")
            (temporary / "notes.json").write_text(json.dumps(notes), encoding="utf-8")
    if processes > 1 and common:
        torch.distributed.barrier()


def _restore(block: BlockView, folder: Path) -> dict[str, Any]:
    if (folder / "block.safetensors").is_file():
        stored = load_file(folder / "block.safetensors")
        for name, parameter in block.module.named_parameters():
            parameter.data.copy_(stored[name])
    notes: dict[str, Any] = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    return notes
