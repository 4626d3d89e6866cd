"""A tiny teacher that has learnt to answer sums, so that its answers are text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import build_tokenizer, save_sums, tiny_config


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, eighty steps on sums."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=320, bos_token_id=0, eos_token_id=2, pad_token_id=2))
    chats = [
        [{"role": "user", "content": f"What is {n} plus {n + 1}?"}, {"role": "assistant", "content": f"{n} plus {n + 1} is {2 * n + 1}."}] for n in range(60)
    ]
    batch = tokenizer([tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats], padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(80):
        rows = slice(step * 15 % 60, step * 15 % 60 + 15)
        model(input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty sums with their answers."""
    return save_sums(tmp_path_factory.mktemp("rows") / "sums.jsonl", 30)
