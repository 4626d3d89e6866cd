"""A narrower tokenizer cuts the texts it was made for as before, and every other text comes back whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmlite.data.vocabulary import BytePairs, Vocabulary, kept_tokens, narrow_tokenizer
from llmlite.errors import UnsupportedModel
from tests.conftest import build_tokenizer

KEPT_TEXT = "What does the answer return? It does what the user function does. " * 3
OTHER_TEXTS = ["It returns the assistant's system!", "안녕 — naïve 😀\t\x00\u200b", "  two  blanks\nand a line", "<|im_start|>user\nWhat?<|im_end|>", "", "éé"]


def trained(tokenizer: Tokenizer, alphabet: list[str]) -> dict:
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["What does the function do?", "It returns the answer.", "user assistant system", KEPT_TEXT] * 20, trainer)
    return json.loads(tokenizer.to_str())


def wrap(description: dict) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), bos_token="<s>", eos_token="</s>")


def byte_level(ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    if not ignore_merges:
        return build_tokenizer()
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    description = trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    description["model"]["ignore_merges"] = True
    found = wrap(description)
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return found


def with_fallback() -> PreTrainedTokenizerFast:
    """As Gemma and Llama 2 have it: no bytes in the alphabet, but a token for each to fall back to."""
    tokenizer = Tokenizer(token_models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    description = trained(tokenizer, [])
    description["pre_tokenizer"] = None  # merges never cross a blank, so the whole text can be one word
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(t for t in description["model"]["vocab"] if t not in ("<s>", "</s>"))]
    description["model"] |= {"vocab": {token: index for index, token in enumerate(tokens)}, "byte_fallback": True}
    return wrap(description)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "whole words first": lambda: byte_level(ignore_merges=True),
    "byte fallback": with_fallback,
}


def narrowed(tokenizer: PreTrainedTokenizerFast, **options: int) -> tuple[PreTrainedTokenizerFast, list[int]]:
    ids = tokenizer(KEPT_TEXT, add_special_tokens=False)["input_ids"]
    kept = kept_tokens(BytePairs.of(tokenizer), np.bincount(ids, minlength=len(tokenizer)), (), **options)
    return narrow_tokenizer(tokenizer, kept), kept


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_kept_text_is_cut_as_before_and_every_other_comes_back_whole(kind: str) -> None:
    old = TOKENIZERS[kind]()
    new, kept = narrowed(old)
    assert len(new) == len(kept) < len(old)
    before, after = (tokenizer(KEPT_TEXT)["input_ids"] for tokenizer in (old, new))
    assert [kept[index] for index in after] == before
    assert new.convert_ids_to_tokens(after) == old.convert_ids_to_tokens(before)
    for text in OTHER_TEXTS:
        ids, old_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (new, old))
        assert new.decode(ids) == old.decode(old_ids) == text
        assert len(ids) >= len(old_ids)
    longer = sum(len(new(text)["input_ids"]) - len(old(text)["input_ids"]) for text in OTHER_TEXTS)
    assert longer > 0


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_written_with_the_tokens_that_stay_is_the_same_text_and_kept_tokens_only_change_their_number(kind: str) -> None:
    old = TOKENIZERS[kind]()
    new, kept = narrowed(old)
    vocabulary = Vocabulary.of(BytePairs.of(old), kept, len(old) + 3)  # embeddings often have rows that no token uses
    for text in [KEPT_TEXT, *OTHER_TEXTS]:
        ids = old(text, add_special_tokens=False)["input_ids"]
        assert new.decode(vocabulary.expand(ids)) == old.decode(ids)
    ids = old(KEPT_TEXT, add_special_tokens=False)["input_ids"]
    assert vocabulary.expand(ids).tolist() == new(KEPT_TEXT, add_special_tokens=False)["input_ids"]
    assert [len(part) for part in vocabulary.pieces[-3:]] == [0, 0, 0]


def test_special_tokens_keep_their_meaning_and_the_template_its_text(tmp_path: Path) -> None:
    old = build_tokenizer()
    new, _ = narrowed(old)
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "What?"}]
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "model_max_length", "padding_side"):
        assert getattr(again, name) == getattr(old, name)
    assert again.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    ids = again.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert again.decode(ids) == old.apply_chat_template(chat, tokenize=False)
    assert again.convert_ids_to_tokens(ids[0]) == "<|im_start|>"
    assert again.convert_tokens_to_ids("<|im_end|>") == again.eos_token_id == 2


def test_more_can_be_kept_than_is_used() -> None:
    old = build_tokenizer()
    pairs, nothing = BytePairs.of(old), np.zeros(len(old), dtype=np.int64)
    bare = kept_tokens(pairs, nothing, ())
    assert set(bare) == pairs.always
    assert len(kept_tokens(pairs, nothing, (), multiple_of=16)) % 16 == 0
    assert kept_tokens(pairs, nothing, (), keep_first=len(old)) == list(range(len(old)))
    counts = nothing.copy()
    counts[-1], counts[-2] = 5, 1
    assert len(old) - 1 in kept_tokens(pairs, counts, (), min_count=2)
    assert len(old) - 2 not in set(kept_tokens(pairs, counts, (), min_count=2)) - pairs.ancestors(old.convert_ids_to_tokens(len(old) - 1))


def test_a_row_says_where_the_tokens_of_the_base_begin() -> None:
    vocabulary = Vocabulary(np.array([0, 2]), (np.array([0]), np.array([1, 0, 1]), np.array([1])))
    row = vocabulary.expand_row({"input_ids": [2, 1, 0, 1], "labels": [-100, 1, 0, -100], "position_ids": [0, 1, 0, 1]})
    assert row == {
        "input_ids": [1, 1, 0, 1, 0, 1, 0, 1],
        "labels": [-100, 1, 0, 1, 0, -100, -100, -100],
        "starts": [0, 1, 0, 0, 1, 0, 0, 0],
        "position_ids": [0, 1, 2, 3, 0, 1, 2, 3],
    }


def test_what_was_kept_is_read_back_and_narrowing_twice_is_narrowing_once(tmp_path: Path) -> None:
    old = build_tokenizer()
    new, kept = narrowed(old, keep_first=300)
    first = Vocabulary.of(BytePairs.of(old), kept, len(old))
    first.save(tmp_path / "v.json")
    read = Vocabulary.read(tmp_path / "v.json")
    assert read.kept_K.tolist() == kept
    assert all(np.array_equal(one, other) for one, other in zip(read.pieces, first.pieces, strict=True))
    newer, kept_later = narrowed(new)
    both = Vocabulary.of(BytePairs.of(new), kept_later, len(new)).after(first)
    for text in [KEPT_TEXT, *OTHER_TEXTS]:
        assert newer.decode(both.expand(old(text, add_special_tokens=False)["input_ids"])) == text
    assert [old.convert_ids_to_tokens(int(index)) for index in both.kept_K] == newer.convert_ids_to_tokens(range(len(newer)))


def test_tokenizers_that_cannot_lose_tokens_say_why() -> None:
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(token_models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), unk_token="<unk>")
    with pytest.raises(UnsupportedModel, match="Unigram, not byte-pair"):
        BytePairs.of(unigram)
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(token_models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>")))
    with pytest.raises(UnsupportedModel, match="neither on bytes"):
        BytePairs.of(letters)
