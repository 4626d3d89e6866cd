"""On-policy batches: prompts found, answers drawn from the student's own distribution, weights as for given text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmlite
from llmlite.context import Run
from llmlite.data.collate import PackedCollator, PaddedCollator
from llmlite.distillation.on_policy import OnPolicy, prompts_of, sample_answers
from llmlite.training.token_loss import IGNORE_INDEX
from tests.conftest import build_tiny

X = IGNORE_INDEX


def test_prompts_end_where_training_begins_in_packed_and_padded_rows():
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [X, X, 7, 8, 9], "position_ids": [0, 1, 2, 3, 4]},
        {"input_ids": [10, 11, 12, 13], "labels": [X, X, X, 13], "position_ids": [0, 1, 2, 3]},
    ]
    expected = [([5, 6], 3), ([10, 11, 12], 1)]
    assert prompts_of(PaddedCollator()(rows)) == expected
    one = {name: rows[0][name] + rows[1][name] for name in rows[0]}
    short = {name: values[:4] for name, values in one.items()}
    assert prompts_of(PackedCollator()([one, short])) == [*expected, ([5, 6], 2)]


def test_of_plain_text_the_first_quarter_is_the_prompt():
    ids = list(range(5, 17))
    assert prompts_of(PaddedCollator()([{"input_ids": ids, "labels": ids}])) == [(ids[:3], 9)]


def test_answers_follow_the_students_distribution_whatever_the_padding():
    """Frequencies of the first token of many answers against the softmax, for prompts of different lengths in one batch."""
    model = build_tiny("llama").train()
    prompts = [[5, 6, 7], [8]]
    many = [prompt for prompt in prompts for _ in range(2000)]
    torch.manual_seed(0)
    answers = sample_answers(model, many, [1] * len(many), (), 0)
    assert model.training
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = model.eval()(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].softmax(-1)
        found = torch.bincount(torch.tensor(answers[index * 2000 : (index + 1) * 2000]).flatten(), minlength=96) / 2000
        assert (found - expected).abs().sum() / 2 < 0.1  # total variation


def test_answers_end_at_their_length_or_after_an_end_token():
    model = build_tiny("llama")
    answers = sample_answers(model, [[5, 6], [7]] * 10, [3, 9] * 10, tuple(range(40)), 0)
    for answer, length in zip(answers, [3, 9] * 10, strict=True):
        assert 1 <= len(answer) <= length
        assert all(token >= 40 for token in answer[:-1])
        assert len(answer) == length or answer[-1] < 40


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_batch_whose_longest_prompt_and_answer_together_pass_the_last_position_is_written_in_several(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny(family, max_position_embeddings=64)
    prompts, lengths = [[5] * 60, [6] * 4, [7] * 30, [8] * 2], [4, 60, 34, 2]
    widths = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: widths.append(real(**inputs)) or widths[-1])
    assert [len(answer) for answer in sample_answers(model, prompts, lengths, (), 0)] == lengths
    assert [tuple(ids.shape) for ids in widths] == [(2, 64), (1, 64), (1, 64)]
    widths.clear()
    assert [len(answer) for answer in sample_answers(model, prompts, [4, 4, 1, 2], (), 0)] == [4, 4, 1, 2]
    assert len(widths) == 1  # all fit together


def test_the_share_is_as_asked_and_the_same_after_a_resume():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [X, X, 7, 8]}]
    model = build_tiny("llama")
    policy = OnPolicy(0.3, 8, (2,), 0)
    batch = {**PaddedCollator()(rows), "rows": torch.tensor([0])}
    sampled = ["rows" not in policy.rewrite(model, batch, f"0-{step}") for step in range(100)]
    assert 20 <= sum(sampled) <= 40
    assert sampled == ["rows" not in policy.rewrite(model, batch, f"0-{step}") for step in range(100)]
    rewritten = OnPolicy(1.0, 8, (2,), 0).rewrite(model, batch, "0")
    assert rewritten["input_ids"][0, :2].tolist() == [5, 6]
    assert rewritten["labels"][0, :2].tolist() == [X, X]


@pytest.mark.parametrize("lora", [False, True])
def test_a_student_learns_from_its_own_answers(model_folder: Path, pairs_file: Path, tmp_path: Path, lora: bool) -> None:
    step = llmlite.DistillWhiteBox(
        on_policy=1.0, on_policy_tokens=6, max_steps=2, learning_rate=1e-3, adapter=llmlite.Lora() if lora else None, logging_steps=1
    )
    recipe = llmlite.Recipe(model=str(model_folder), data=llmlite.Data(train=str(pairs_file), max_length=64, evaluation_rows=6), steps=[step])
    recipe.check()
    run = Run(recipe, scratch=tmp_path)
    student = step.apply(run.load_base(), run)
    assert run.notes["optimizer_steps"] == 2
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    assert abs(run.notes["train_loss"][-1]["loss"]) < 0.01  # the student is its own teacher, and its own words have no cross entropy
