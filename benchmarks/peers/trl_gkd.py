"""TRL's GKDTrainer off-policy: forward KL on the given windows, all weights, the teacher beside the student."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import ROWS_OF_A_STEP, STEPS, dense, run
from transformers import AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids_BT = torch.tensor([row["input_ids"] for row in rows])
    ones_BT = torch.ones_like(ids_BT)
    return {"input_ids": ids_BT, "attention_mask": ones_BT, "labels": ids_BT, "prompts": ids_BT[:, :1], "prompt_attention_mask": ones_BT[:, :1]}


def compress(args: argparse.Namespace, windows_NT: torch.Tensor) -> Any:
    from datasets import Dataset

    settings = GKDConfig(
        output_dir=str(args.hidden.parent / "trl"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS_OF_A_STEP,
        max_steps=STEPS,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = GKDTrainer(
        model=dense(args.student),
        teacher_model=dense(args.model),
        args=settings,
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": windows_NT.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    trainer.train()
    return trainer.model


if __name__ == "__main__":
    run(compress)
