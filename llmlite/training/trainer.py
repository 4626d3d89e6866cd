"""The one training path: transformers.Trainer with a loss that never holds all logits, sealed checkpoints and a clean stop.

DDP, FSDP, DeepSpeed, gradient accumulation, mixed precision, loggers and resume are the Trainer's. What a method adds is a loss
(`TokenLoss`); what it trains is whatever requires a gradient in the model it hands over.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmlite.errors import Interrupted, OutputError, RunError
from llmlite.models.device_map import is_offloaded
from llmlite.training.backbone import hidden_and_head
from llmlite.training.checkpoints import SealCheckpoints, StopRequest, newest_complete, stopping_at_signals
from llmlite.training.chunked import chunked_head_loss
from llmlite.training.keep_zeros import KeepZeros
from llmlite.training.rows import EMPTY, EvenSampler, WithEmptyRow
from llmlite.training.settings import TrainingStep
from llmlite.training.sharded import forget_zero3, lend, plain_errors, take_back
from llmlite.training.token_loss import IGNORE_INDEX, CrossEntropy, TokenLoss, next_token_labels
from llmlite.training.trackers import run_name, tracked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlite.context import Run

__all__ = ["Companion", "LiteTrainer", "LossMaker", "train", "trainer_arguments"]

log = logging.getLogger(__name__)

LossMaker = Callable[[dict[str, Tensor], Tensor], TokenLoss]
"""(inputs of the batch, labels of the next token (N,)) -> the loss of these tokens. The inputs are the model's, and `rows`: which rows of the training
data these are, int64, (B,), for what was computed of each row beforehand; a batch that no row stands behind has none."""


def _cross_entropy(inputs: dict[str, Tensor], labels_N: Tensor) -> TokenLoss:
    return CrossEntropy(labels_N)


class Companion:
    """What a method does around the loss of a batch, besides the loss through the head: by default nothing."""

    def rewrite(self, model: Any, inputs: dict[str, Any], seed: str) -> dict[str, Any]:
        """Another batch instead of this one, for instance one that the model wrote. `seed` differs for each micro-batch and is the same after a resume."""
        return inputs

    def watching(self, model: Any) -> AbstractContextManager[None]:
        """Around the model's forward pass: to see what happens inside."""
        return contextlib.nullcontext()

    def losses(self, inputs: dict[str, Any], keep_N: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Further losses of this batch after its forward pass: name -> (weight, sum over the kept tokens)."""
        return {}

    def callbacks(self) -> Sequence[TrainerCallback]:
        """For the Trainer; they come before a checkpoint is sealed."""
        return ()


class LiteTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss goes through the LM head in chunks, normalised by the tokens of the whole optimizer step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, make_loss: LossMaker = _cross_entropy, companion: Companion | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the tokens of the optimizer step for us
        self.make_loss, self.companion = make_loss, companion or Companion()
        self.place = (-1, 0)  # optimizer step, forward pass of it
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}  # name -> sum and number of its tokens since the last line of the log

    def get_train_dataloader(self) -> Any:
        """Called by the Trainer. Several processes read all rows once in an epoch, however many there are; see `llmlite.training.rows`."""
        loader, processes = super().get_train_dataloader(), self.accelerator.num_processes
        if processes > 1:
            loader.set_sampler(EvenSampler(len(self.train_dataset), processes * self._train_batch_size, self.args.data_seed))
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer, which reads one more batch before it looks whether all steps are done: one too many behind the last checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Called by the Trainer for each forward pass; see `llmlite.training.chunked`."""
        given = int((inputs["labels"][..., 1:] != IGNORE_INDEX).sum())
        step, forward_pass = self.place
        self.place = (self.state.global_step, forward_pass + 1 if step == self.state.global_step else 0)
        inputs = dict(self.companion.rewrite(model, dict(inputs), f"{self.args.seed}-{self.place}"))
        labels_N = next_token_labels(inputs.pop("labels")).reshape(-1)
        keep_N = labels_N != IGNORE_INDEX
        if num_items_in_batch is not None and given and (kept := int(keep_N.sum())) != given:
            num_items_in_batch = num_items_in_batch * (kept / given)  # a rewritten batch weighs as much as the one it stands for
        with self.companion.watching(model):  # through every wrapper, so that DDP and FSDP see a forward pass of theirs
            hidden_BTD, head, transform = hidden_and_head(model, {name: value for name, value in inputs.items() if name != "rows"})
        found = chunked_head_loss(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            head,
            self.make_loss(inputs, labels_N),
            keep_N=keep_N,
            num_items_in_batch=num_items_in_batch,
            transform=transform,
        )
        tokens = keep_N.sum()
        loss = found.loss
        count = (tokens.clamp(min=1) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)).to(loss.device)
        sums = {name: value.to(loss.device) * count for name, value in found.parts.items()}
        for name, (weight, total) in self.companion.losses(inputs, keep_N).items():
            sums[name] = total.detach().to(loss.device)
            loss = loss + weight * total.to(loss.device) / count
        for name, total in sums.items():
            before = self.parts.get(name, (0.0, 0))
            self.parts[name] = (before[0] + total, before[1] + tokens)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is over all processes; DDP averages their gradients
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer; adds the parts of the loss where there are several, unweighted means over their tokens since the last line."""
        if "loss" in logs:
            if len(self.parts) > 1:
                logs = {**logs, **{name: float(total) / max(int(tokens), 1) for name, (total, tokens) in self.parts.items()}}
            self.parts = {}
        super().log(logs, *args, **kwargs)


@dataclass(frozen=True)
class _Numbered:
    """A collator that also says which rows it was given, the empty one not counted."""

    collate: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        return {**self.collate(rows), "rows": torch.tensor([row["row"] for row in rows if row["row"] != EMPTY], dtype=torch.int64)}


class _StopAtNan(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose loss is no number any more, before it burns hours."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Called by the Trainer."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise RunError(f"the loss became {loss} at step {state.global_step}. Lower learning_rate, or raise warmup_steps; the last checkpoint is kept.")


def trainer_arguments(step: TrainingStep, run: Run, folder: Path) -> TrainingArguments:
    """A step's settings as transformers' TrainingArguments."""
    dtype = run.compute_dtype
    checkpointing = step.recomputes(run.device)
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=step.peak_learning_rate(run.config.get_text_config().hidden_size),
        max_steps=run.max_steps(step) or -1,
        num_train_epochs=step.num_train_epochs,
        per_device_train_batch_size=step.per_device_train_batch_size,
        gradient_accumulation_steps=step.gradient_accumulation_steps,
        lr_scheduler_type=step.lr_scheduler_type,
        warmup_steps=step.warmup_steps,
        weight_decay=step.weight_decay,
        max_grad_norm=step.max_grad_norm,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        save_steps=step.save_steps,
        save_total_limit=None,  # `SealCheckpoints` removes old ones
        logging_steps=step.logging_steps,
        logging_strategy="steps",
        report_to=list(step.report_to) or "none",
        run_name=run_name(run, step.report_to, folder),
        seed=run.recipe.seed,
        data_seed=run.recipe.seed,
        use_cpu=run.device.type == "cpu",
        ddp_find_unused_parameters=False,  # there are none; looking for them costs time, and torch then says so in the middle of the bar
        dataloader_pin_memory=run.device.type != "cpu",
        remove_unused_columns=False,
        disable_tqdm=not run.is_main,
    )


def _require_same_rows(folder: Path, fingerprint: str, checkpoint: Path | None) -> None:
    """Refuse to continue on other rows: the checkpoint's place in the data would mean something else."""
    note = folder / "rows.txt"
    if checkpoint and note.is_file() and note.read_text(encoding="utf-8") != fingerprint:
        raise OutputError(f"the training rows have changed since {checkpoint} was written. Restore them, or start afresh with --overwrite_output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(fingerprint, encoding="utf-8")


def train(
    model: PreTrainedModel, step: TrainingStep, run: Run, make_loss: LossMaker | None = None, companion: Companion | None = None
) -> list[dict[str, float]]:
    """Train what requires a gradient, resuming from the newest whole checkpoint of the same step.

    Args:
        model: in place; left in eval mode.
        step: the settings.
        run: gives rows, folder, device and seed.
        make_loss: the loss; None for cross entropy.
        companion: what else happens around it; see `Companion`.

    Returns:
        The log: one entry for each logged step with its loss and learning rate.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
        RunError: the loss is no number any more, or part of the model is offloaded.
    """
    if is_offloaded(model):
        raise RunError("weights that device_map has offloaded get no gradients. Train on a device that holds the model, or on what `quantize` makes of it.")
    folder = run.scratch / "trainer"
    checkpoint = run.agreed(newest_complete(folder) if run.is_main else None)
    if checkpoint:
        log.info("continuing the training from %s", checkpoint.name)
    data = run.train_data
    if run.is_main:
        _require_same_rows(folder, data.fingerprint(), checkpoint)
    stop = StopRequest()
    arguments = trainer_arguments(step, run, folder)
    trained = lend(model) if run.layout.sharded else model
    trainer = LiteTrainer(
        model=trained,
        args=arguments,
        optimizers=(step.optimizer(trained, arguments.learning_rate), None),
        train_dataset=WithEmptyRow(data.dataset.add_column("row", list(range(len(data.dataset))))),
        data_collator=_Numbered(data.collator(flatten="flash" in str(model.config._attn_implementation))),
        callbacks=[*(companion.callbacks() if companion else ()), SealCheckpoints(), stop, _StopAtNan(), KeepZeros()],
        make_loss=make_loss or _cross_entropy,
        companion=companion,
    )
    try:
        with stopping_at_signals(stop), tracked(trainer.callback_handler.callbacks, run, arguments.run_name, folder), plain_errors():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        if run.layout.kind == "zero3":
            forget_zero3()
    if stop.asked:
        raise Interrupted(f"stopped after optimizer step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is saved.")
    if trained is not model:
        take_back(model, trained)
    model.eval()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    run.note(
        trained_tokens=data.counts.trained_tokens,
        optimizer_steps=trainer.state.global_step,
        train_loss=[{"step": entry["step"], "loss": entry["loss"]} for entry in history],
    )
    return history
