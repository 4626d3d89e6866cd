"""Which checkpoints of training stay, and which rows each process reads between them."""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.distributed.checkpoint import CheckpointException
from torch.utils.data import BatchSampler

import llmlite
from llmlite.context import Run
from llmlite.data.collate import PackedCollator, PaddedCollator
from llmlite.errors import ResourceError
from llmlite.recipe import Recipe
from llmlite.storage import telling_full
from llmlite.training.checkpoints import newest_complete
from llmlite.training.rows import EMPTY, EvenSampler, WithEmptyRow
from llmlite.training.sharded import plain_errors
from llmlite.training.trainer import train


def test_after_the_clock_went_back_the_newest_checkpoints_stay_and_training_ends_with_the_same_weights(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    def trained(place: Path, *steps: int) -> dict[str, torch.Tensor]:
        for number in steps:
            run = Run(Recipe.from_options(("test", {"model": str(model_folder), "data": {"train": str(pairs_file), "max_length": 32}, "steps": ["finetune"]})))
            run.scratch, model = place, run.load_base()
            settings = {"per_device_train_batch_size": 2, "save_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
            train(model, llmlite.Finetune(max_steps=number, **settings), run)  # type: ignore[arg-type]
            for checkpoint in (place / "trainer").glob("checkpoint-*"):  # written on a day that is now to come
                os.utime(checkpoint, (time.time() + 86_400,) * 2)
        return model.state_dict()

    at_once, continued = trained(tmp_path / "at once", 4), trained(tmp_path / "continued", 2, 4)
    work = tmp_path / "continued" / "trainer"
    assert sorted(place.name for place in work.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert newest_complete(work) == work / "checkpoint-4"
    assert all(torch.equal(at_once[name], continued[name]) for name in at_once)


@pytest.mark.parametrize("failed_on", [0, 1])
def test_what_one_process_could_not_write_of_a_checkpoint_in_parts_is_the_error_of_all(failed_on: int, tmp_path: Path) -> None:
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "__1_0.distcp"))
    with pytest.raises(ResourceError, match="the disk is full") as caught, telling_full(tmp_path), plain_errors():
        raise CheckpointException("write", {failed_on: (refused, traceback.StackSummary())})
    assert caught.value.__cause__ is refused
    with pytest.raises(KeyError, match="ours"), telling_full(tmp_path), plain_errors():
        raise CheckpointException("plan", {failed_on: (KeyError("ours"), traceback.StackSummary())})


@pytest.mark.parametrize(("rows", "batch", "processes"), [(18, 2, 2), (7, 3, 4), (1, 2, 3), (12, 2, 3)])
def test_processes_together_read_every_row_once_in_an_epoch_in_the_order_of_one(rows: int, batch: int, processes: int) -> None:
    def order(epoch: int, count: int) -> list[int]:
        if count == 1:
            sampler = SeedableRandomSampler(range(rows), data_seed=5)
            sampler.set_epoch(epoch)
            return list(sampler)
        shares = []
        for rank in range(count):
            even = EvenSampler(rows, count * batch, seed=5)
            even.set_epoch(epoch)
            shares.append(list(BatchSamplerShard(BatchSampler(even, batch, drop_last=False), count, rank)))
        assert len({len(share) for share in shares}) == 1
        return [row for together in zip(*shares, strict=True) for part in together for row in part]

    for epoch in (0, 3):
        read = order(epoch, processes)
        assert [row for row in read if row != rows] == order(epoch, 1)
        assert Counter(read)[rows] == -rows % (batch * processes)


@pytest.mark.parametrize("collate", [PaddedCollator(), PackedCollator(), PackedCollator(flatten=True)], ids=["padded", "packed", "flattened"])
def test_the_empty_row_trains_nothing(collate: PaddedCollator | PackedCollator) -> None:
    rows = WithEmptyRow([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2], "row": 0}])
    assert len(rows) == 1
    assert rows[1]["row"] == EMPTY
    batch = collate([rows[0], rows[1]])
    assert int((batch["labels"] != -100).sum()) == 2
    assert len(batch["input_ids"].flatten()) <= 6
