"""QLoRA as the documentation of transformers, peft and bitsandbytes shows it: no llmlite. Padded batches, full logits, gradient checkpointing."""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("answer", type=Path)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", type=Path, required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--learning-rate", type=float, required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--max-length", type=int, required=True)
parser.add_argument("--checkpointing", type=int, default=1)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
tokenizer = AutoTokenizer.from_pretrained(args.model)
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"})
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(args.checkpointing))
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def encode(row: dict[str, str]) -> dict[str, list[int]]:
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][: args.max_length]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


rows = [encode(json.loads(line)) for line in args.rows.read_text(encoding="utf-8").splitlines()]
rows = [row for row in rows if any(label != -100 for label in row["labels"])]
random.Random(args.seed).shuffle(rows)
tokens = sum(len(row["input_ids"]) for row in rows)


class Clock(TrainerCallback):
    def on_train_begin(self, *_args: object, **_kwargs: object) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, *_args: object, **_kwargs: object) -> None:
        self.seconds = time.perf_counter() - self.started


clock = Clock()
trainer = Trainer(
    model=model,
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    callbacks=[clock],
    args=TrainingArguments(
        output_dir=args.adapter + "-trainer",
        per_device_train_batch_size=args.batch,
        num_train_epochs=1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=args.seed,
        disable_tqdm=True,
        weight_decay=0.0,
    ),
)
trainer.train()
model.save_pretrained(args.adapter)
args.answer.write_text(
    json.dumps(
        {
            "tokens": tokens,
            "train_seconds": clock.seconds,
            "steps": trainer.state.global_step,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
