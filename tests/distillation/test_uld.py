"""Across tokenizers: sorted distributions, positions aligned by characters, and vocabularies that only look alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmlite.data.collate import PackedCollator, PaddedCollator
from llmlite.distillation.teacher import AlignedTeacher, LiveTeacher
from llmlite.distillation.uld import align, universal_logit_distance
from llmlite.distillation.vocab import compare
from llmlite.training.token_loss import next_token_labels
from tests.conftest import build_tokenizer, tiny_config


def other_tokenizer(vocabulary: int = 290, specials: tuple[str, ...] = ("<pad>", "</s>"), text: str = "apples and pears are fruit") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on something else, with other special tokens."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=specials[-1], pad_token=specials[0])


TEXTS = ["What does the function do? apples and pears", "naïve café – 日本語 🙂 done", "  two  blanks\n\tand a tab", "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_aligned_positions_have_read_the_same_characters(text):
    student, teacher = build_tokenizer(), other_tokenizer()
    ids = student(text)["input_ids"]
    alignment = align(ids, student, teacher)
    assert teacher.decode(alignment.teacher_ids) == text
    pairs = [(place, other) for place, other in enumerate(alignment.places) if other >= 0]
    assert pairs[-1] == (len(ids) - 1, len(alignment.teacher_ids) - 1)
    for place, other in pairs:
        assert student.decode(ids[: place + 1]) == teacher.decode(alignment.teacher_ids[: other + 1])
    ends = {teacher.decode(alignment.teacher_ids[: n + 1]) for n in range(len(alignment.teacher_ids))}
    aligned = {place for place, _ in pairs}
    for place in range(len(ids)):  # and no position that could be aligned was left out
        read = student.decode(ids[: place + 1])
        assert (place in aligned) == (text.startswith(read) and read in ends)


def test_the_same_tokenizer_aligns_every_token_with_itself():
    tokenizer = build_tokenizer()
    ids = tokenizer("What is the answer, system?")["input_ids"]
    assert align(ids, tokenizer, tokenizer).places == list(range(len(ids)))


def test_special_tokens_stay_only_where_the_teacher_knows_them():
    student = build_tokenizer()
    ids = student("<|im_start|>user answer<|im_end|>")["input_ids"]
    stranger, friend = other_tokenizer(), other_tokenizer(specials=("<|im_start|>", "<|im_end|>"))
    away, kept = align(ids, student, stranger), align(ids, student, friend)
    assert stranger.decode(away.teacher_ids) == "user answer"
    assert (away.places[0], away.places[-1]) == (-1, -1)
    assert friend.decode(kept.teacher_ids) == "<|im_start|>user answer<|im_end|>"
    assert min(kept.places[0], kept.places[-1]) >= 0


def test_the_distance_forgets_which_token_is_which_and_pads_the_smaller_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    shuffled_NV = logits_NV[:, torch.randperm(11, generator=generator)]
    assert universal_logit_distance(logits_NV, shuffled_NV).abs().max() < 1e-12
    wider_NV = torch.cat([torch.full((5, 3), -torch.inf, dtype=torch.float64), shuffled_NV], dim=1)
    assert universal_logit_distance(logits_NV, wider_NV).abs().max() < 1e-12
    aligned_N = torch.tensor([True, False, True, True, False])
    other_NV = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    whole_N = universal_logit_distance(logits_NV, other_NV)
    assert torch.equal(universal_logit_distance(logits_NV, other_NV, aligned_N=aligned_N), whole_N * aligned_N)


@pytest.mark.parametrize("packed", [True, False])
def test_the_teacher_is_asked_where_the_student_stands(packed):
    student, teacher = build_tokenizer(), other_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=320, eos_token_id=1)).eval()
    texts = [student(text)["input_ids"] for text in TEXTS[:2]]
    if packed:
        joined = [token for text in texts for token in text]
        row = {"input_ids": joined, "labels": joined, "position_ids": [i for text in texts for i in range(len(text))]}
        batch = PackedCollator()([row, {name: values[:9] for name, values in row.items()}])
    else:
        batch = PaddedCollator()([{"input_ids": text, "labels": text} for text in texts])
    labels_N = next_token_labels(batch.pop("labels")).reshape(-1)
    signal = AlignedTeacher(LiveTeacher(model), student, teacher).signal(batch, labels_N)
    logits_NW, aligned_N = signal.signal(torch.arange(len(labels_N)), torch.device("cpu"))
    start = 0 if packed else batch["input_ids"].shape[1]
    first = len(texts[0]) if packed else start
    alignment = align(texts[1], student, teacher)
    alone_SW = model(input_ids=torch.tensor([alignment.teacher_ids])).logits[0]
    for place, other in enumerate(alignment.places):
        assert bool(aligned_N[first + place]) == (other >= 0)
        if other >= 0:
            torch.testing.assert_close(logits_NW[first + place], alone_SW[other], rtol=1e-4, atol=1e-5)


# Vocabularies ------------------------------------------------------------------------------------------------------------------------


def test_a_vocabulary_padded_to_another_size_is_the_same():
    assert compare(build_tokenizer(), build_tokenizer(), 384).problem is None


def test_another_tokenizer_is_a_problem():
    assert "different tokenizers" in (compare(build_tokenizer(), other_tokenizer(), 320).problem or "")


def test_the_same_tokens_under_other_ids_are_found(tmp_path: Path):
    student = build_tokenizer()
    student.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = plain["model"]["vocab"]
    one, other = (token for token, i in vocabulary.items() if i in (100, 101))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(plain), encoding="utf-8")
    problem = compare(student, PreTrainedTokenizerFast.from_pretrained(tmp_path), 320).problem
    assert "look alike" in (problem or "")
    assert "2 ids" in (problem or "")


def test_a_renamed_special_token_and_a_missing_one_are_told_and_allowed():
    student, teacher = build_tokenizer(), other_tokenizer(vocabulary=320, specials=("<s>", "<|im_start|>", "<|end|>"), text="What does the function do?")
    base = build_tokenizer()
    base.add_tokens(["<new>"])
    assert compare(base, build_tokenizer(), 384).missing == ("<new>",)
    assert "beyond the teacher's vocabulary of 306" in (compare(base, build_tokenizer(), 306).problem or "")
    renamed = Tokenizer.from_str(student.backend_tokenizer.to_str().replace("<|im_end|>", "<|done|>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=renamed, eos_token="<|done|>")
    assert compare(student, wrapped, 320).problem is None
    assert compare(student, wrapped, 320).renamed == ((2, "<|im_end|>", "<|done|>"),)
    assert compare(student, teacher, 320).problem is not None
