"""One held-out question, answered greedily: figures alone hide a model that answers nonsense."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmlite.errors import counted
from llmlite.models.adapted import longest_text, tokens_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmlite.data.text import Rows

__all__ = ["sample"]


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, new_tokens: int = 48, index: int = 0) -> dict[str, str]:
    """Greedy answer to one held-out prompt.

    Args:
        model: any causal LM; left in the mode it was in.
        tokenizer: its chat template is used where there is one.
        rows: held-out rows; of plain text the first words are the prompt.
        new_tokens: longest answer; shorter where the model has fewer positions left behind the prompt.
        index: which row.

    Returns:
        ``prompt``, ``expected`` and ``answer``, as text. A prompt that leaves no position is not asked, and the answer says so in brackets.
    """
    prompt, expected, messages = _question(rows, index)
    if messages and tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():  # a chat that begins with the answer asks nothing
        return {"prompt": "", "expected": _short(expected), "answer": ""}
    read = inputs["input_ids"].shape[1]
    new_tokens = tokens_left(model, read, new_tokens)
    if not new_tokens:
        reason = f"[not asked: the prompt has {counted(read, 'token')}, and the model reads {longest_text(model)} with its answer]"
        return {"prompt": _short(prompt), "expected": _short(expected), "answer": reason}
    was_training = model.training
    model.eval()
    inputs = {name: tensor.to(model.get_input_embeddings().weight.device) for name, tensor in inputs.items() if name != "token_type_ids"}
    if getattr(model.generation_config, "stop_strings", None):
        inputs["tokenizer"] = tokenizer
    output_BT = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    model.train(was_training)
    answer = tokenizer.decode(output_BT[0, read:], skip_special_tokens=True)
    return {"prompt": _short(prompt), "expected": _short(expected), "answer": _short(answer)}


def _question(rows: Rows, index: int) -> tuple[str, str, list[dict[str, str]]]:
    row = rows.rows[index]
    if rows.kind == "pair":
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return row["prompt"], row["completion"], [*system, {"role": "user", "content": row["prompt"]}]
    if rows.kind == "chat":
        last = max(place for place, message in enumerate(row["messages"]) if message["role"] == "assistant")
        messages = row["messages"][:last]
        return str(messages[-1]["content"]) if messages else "", str(row["messages"][last]["content"]), messages
    words = row["text"].split()
    return " ".join(words[:24]), " ".join(words[24:72]), []


def _short(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
