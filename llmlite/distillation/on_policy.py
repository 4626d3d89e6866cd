"""On-policy distillation: for a share of the batches the student writes the answers and the teacher says what it would have said there.

    with probability `fraction`:  y ~ student(. | x),  loss = divergence(teacher, student) on y
    else:                         the text itself,     loss = CE and divergence on it

The student meets its own mistakes, which it never does on given text. No gradient goes through the sampling, and there is no cross entropy on what the student
made up.

Shapes: B sequences, T positions.

Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649, algorithm 1 (`fraction` is its lambda).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import TrainerCallback

from llmlite.data.collate import PaddedCollator, examples_of
from llmlite.models.adapted import longest_text
from llmlite.training.token_loss import IGNORE_INDEX
from llmlite.training.trainer import Companion

__all__ = ["OnPolicy", "prompts_of", "sample_answers"]

_PLAIN_PROMPT = 4  # of plain text, where nothing says what the prompt is, the first quarter


@dataclass(frozen=True)
class OnPolicy(Companion):
    """Replaces a share of the batches by the student's own answers.

    Attributes:
        fraction: share of the batches.
        most_tokens: longest answer.
        end_ids: tokens that end an answer.
        pad_id: any id.
        inner: what else accompanies the batches, whoever wrote them.
    """

    fraction: float
    most_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    inner: Companion | None = None

    def rewrite(self, model: Any, inputs: dict[str, Any], seed: str) -> dict[str, Any]:
        """The batch, or the student's answers to its prompts; those have no `rows`."""
        if random.Random(f"on-policy-{seed}").random() >= self.fraction:
            return inputs
        prompts = prompts_of(inputs)
        if not prompts:
            return inputs
        lengths = [min(length, self.most_tokens) for _, length in prompts]
        answers = sample_answers(model, [prompt for prompt, _ in prompts], lengths, self.end_ids, self.pad_id)
        rows = [
            {"input_ids": [*prompt, *answer], "labels": [*[IGNORE_INDEX] * len(prompt), *answer]} for (prompt, _), answer in zip(prompts, answers, strict=True)
        ]
        device = inputs["input_ids"].device
        return {name: value.to(device) for name, value in PaddedCollator(self.pad_id)(rows).items()}

    def watching(self, model: Any) -> AbstractContextManager[None]:
        """See `Companion.watching`."""
        return self.inner.watching(model) if self.inner else nullcontext()

    def losses(self, inputs: dict[str, Any], keep_N: Tensor) -> dict[str, tuple[float, Tensor]]:
        """See `Companion.losses`."""
        return self.inner.losses(inputs, keep_N) if self.inner else {}

    def callbacks(self) -> Sequence[TrainerCallback]:
        """See `Companion.callbacks`."""
        return self.inner.callbacks() if self.inner else ()


def prompts_of(inputs: dict[str, Tensor]) -> list[tuple[list[int], int]]:
    """Prompt and length of the answer of each example of a batch. Of plain text the first quarter is the prompt."""
    found = []
    for row, places in examples_of(inputs):
        ids, labels = inputs["input_ids"][row, places].tolist(), inputs["labels"][row, places].tolist()
        trained = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
        if not trained:
            continue
        first = trained[0] if trained[0] > 1 else max(1, len(ids) // _PLAIN_PROMPT)  # one token is BOS, no prompt
        if first < len(ids):
            found.append((ids[:first], len(ids) - first))
    return found


@torch.no_grad()
def sample_answers(model: Any, prompts: list[list[int]], lengths: list[int], end_ids: tuple[int, ...], pad_id: int) -> list[list[int]]:
    """Answers drawn from the model at temperature 1; each ends with an end token or at its length.

    All prompts are in one batch, which goes on until the longest answer is written, behind the longest prompt. Where the model has fewer positions than that,
    they are in several.

    Args:
        model: in any mode, which it keeps; wrapped by DDP or PEFT if you like.
        prompts: ids.
        lengths: most tokens of each answer, at least 1, and no more than the model has positions for behind its prompt.
        end_ids, pad_id: see `OnPolicy`.
    """
    bare = extract_model_from_parallel(model)
    answers: list[list[int]] = [[]] * len(prompts)
    training = bare.training
    bare.eval()
    try:
        for places in _batches([*map(len, prompts)], lengths, longest_text(bare)):
            found = _sampled(bare, [prompts[place] for place in places], [lengths[place] for place in places], end_ids, pad_id)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
    finally:
        bare.train(training)
    return answers


def _batches(read: list[int], wanted: list[int], longest: int | None) -> list[list[int]]:
    """Places of prompts that can be answered together: the longest prompt of each batch and its longest answer fit into `longest` tokens."""
    if longest is None or max(read) + max(wanted) <= longest:
        return [[*range(len(read))]]
    batches: list[list[int]] = []
    for place in sorted(range(len(read)), key=lambda place: read[place]):
        if batches and read[place] + max(wanted[other] for other in [*batches[-1], place]) <= longest:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _sampled(bare: Any, prompts: list[list[int]], lengths: list[int], end_ids: tuple[int, ...], pad_id: int) -> list[list[int]]:
    """One batch of `sample_answers`, of a model in eval mode."""
    from transformers import GenerationConfig

    device = bare.get_input_embeddings().weight.device
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[*[pad_id] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
    mask_BT = torch.tensor([[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts], device=device)
    how = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max(lengths),
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
    )
    output_BT = bare.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=how)
    return [_ended(row[:length], end_ids) for row, length in zip(output_BT[:, width:].tolist(), lengths, strict=True)]


def _ended(ids: list[int], end_ids: tuple[int, ...]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return ids[: end + 1]
