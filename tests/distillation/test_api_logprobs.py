"""Log-probabilities of servers, read, mapped to another vocabulary and put in their places."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from llmlite.data.collate import PackedCollator, PaddedCollator
from llmlite.data.packing import packed_dataset, padded_dataset
from llmlite.data.tokens import Encoded
from llmlite.distillation.api.align import Signal, align, matching, overlap
from llmlite.distillation.api.answers import Accepted, lesson_of
from llmlite.distillation.api.logprobs import Candidate, Position, generated_positions, prompt_positions
from llmlite.distillation.api.prompts import Question
from llmlite.distillation.api.signals import signal_of
from llmlite.distillation.api.vocabulary import Vocabulary, same_ids
from tests.conftest import build_tokenizer


def test_chat_and_completions_say_the_same() -> None:
    chat = {
        "logprobs": {
            "content": [
                {"token": "Hi", "bytes": [72, 105], "logprob": -0.1, "top_logprobs": [{"token": "Hi", "logprob": -0.1}, {"token": "Ho", "logprob": -3.0}]}
            ]
        }
    }
    completions = {"logprobs": {"tokens": ["Hi"], "token_logprobs": [-0.1], "top_logprobs": [{"Hi": -0.1, "Ho": -3.0}]}}
    assert generated_positions(chat) == generated_positions(completions)


def test_the_token_itself_is_a_candidate_even_when_it_is_not_among_the_likeliest() -> None:
    (position,) = generated_positions({"logprobs": {"tokens": ["x"], "token_logprobs": [-9.0], "top_logprobs": [{"y": -0.1}]}}) or []
    assert [candidate.text for candidate in position.candidates] == [b"x", b"y"]


def test_prompt_logprobs_keep_ids_and_skip_the_first_token() -> None:
    body = {"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -1.0, "decoded_token": " a"}, "9": {"logprob": -0.5, "decoded_token": "\ufffd"}}]}]}
    (position,) = prompt_positions(body) or []
    assert position == Position(Candidate(b" a", -1.0, 7), (Candidate(b" a", -1.0, 7), Candidate(None, -0.5, 9)))


@pytest.mark.parametrize(
    "logprobs",
    [None, {}, {"content": None}, {"content": []}, {"content": [{"token": 1}]}, {"content": [{"token": "a", "logprob": math.nan}]}, {"tokens": ["a"]}, "x"],
)
def test_what_is_no_logprobs_is_none(logprobs: object) -> None:
    assert generated_positions({"logprobs": logprobs}) is None


@pytest.mark.parametrize(("token", "text"), [("bytes:\\xe2\\x80", b"\xe2\x80"), ("\ufffd", None), (" é", " é".encode())])
def test_bytes_of_a_token_given_as_text(token: str, text: bytes | None) -> None:
    (position,) = generated_positions({"logprobs": {"tokens": [token], "token_logprobs": [-1.0], "top_logprobs": [{}]}}) or []
    assert position.chosen.text == text


# The student's vocabulary --------------------------------------------------------------------------------------------------------------


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: blanks are ▁, and single bytes stand for what has no token of its own."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {token: 300 + index for index, token in enumerate(["▁", "A", "▁A", "b", "▁b", "▁Ab"])}
    model = token_models.BPE(vocab=vocabulary, merges=[("▁", "A"), ("▁", "b"), ("▁A", "b")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [build_tokenizer, sentencepiece_like])
def test_tokens_spell_what_was_tokenised(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    vocabulary = Vocabulary(tokenizer)
    text = "Ab A\n naïve 東 🙂 b"
    assert b"".join(vocabulary.by_id[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]) == text.encode()
    assert vocabulary.usable


def test_of_two_tokens_with_the_same_bytes_the_written_one_is_taken_and_counted() -> None:
    vocabulary = Vocabulary(sentencepiece_like())
    assert vocabulary.id_of(Candidate(b"A", -1.0)) == 301  # not <0x41>
    assert vocabulary.id_of(Candidate(b" Ab", -1.0)) == 305
    assert vocabulary.id_of(Candidate(b"nowhere", -1.0)) is None
    assert vocabulary.id_of(Candidate(None, -1.0)) is None
    assert dict(vocabulary.counts) == {"mapped": 2, "ambiguous": 1, "unmapped": 2}


def test_answers_that_can_be_placed_nowhere_are_counted() -> None:
    """Two answers: one whose tokens spell what was trained, and one of which the server showed other tokens than it wrote."""
    tokenizer = sentencepiece_like()

    def answered(text: str, *tokens: bytes, other: bytes = b"nowhere") -> Accepted:
        positions = [Position(Candidate(token, -0.1), (Candidate(token, -0.1), Candidate(other, -3.0))) for token in tokens]
        return Accepted(Question("b", {"text": "b"}, "", "row"), text, False, positions)

    def counts(*answers: Accepted) -> dict[str, int]:
        return dict(lesson_of(answers, "the test", tokenizer, 64, candidates=2, packing=False, seed=0).counts)

    good, lost = answered(" Ab", b" Ab"), answered(" Ab", b"zz", b"zz")
    assert counts(good)["unplaced"] == 0
    assert counts(good)["covered_tokens"] > 0
    assert counts(lost)["unplaced"] == 1
    assert counts(lost)["covered_tokens"] == 0
    assert counts(good, lost, lost)["unplaced"] == 2
    assert counts(good)["ambiguous"] == 0
    assert counts(good)["unmapped"] == 1  # nowhere
    unsure = counts(answered(" Ab", b" Ab", other=b"A"))  # a token of its own, and the byte <0x41>
    assert (unsure["ambiguous"], unsure["unmapped"], unsure["unplaced"]) == (1, 0, 0)


def test_ids_are_trusted_only_when_every_clear_token_agrees() -> None:
    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    clear = [(i, text) for i, text in vocabulary.by_id.items() if 32 < text[0] < 127]
    positions = [Position(c, (c,)) for c in (Candidate(text, -1.0, i) for i, text in clear)]
    assert same_ids(vocabulary, [positions])
    wrong = Candidate(clear[0][1], -1.0, clear[1][0])
    assert not same_ids(vocabulary, [positions, [Position(wrong, (wrong,))]])
    assert not same_ids(vocabulary, [positions[:3]])  # too few to tell


# Places --------------------------------------------------------------------------------------------------------------------------------


def cut(text: bytes, cuts: set[int]) -> list[bytes]:
    ends = sorted({0, *(c % (len(text) + 1) for c in cuts), len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@given(st.text(min_size=1, max_size=30), st.sets(st.integers(0, 200), max_size=12), st.sets(st.integers(0, 200), max_size=12))
def test_matching_is_equal_tokens_in_equal_places(text: str, ours: set[int], theirs: set[int]) -> None:
    student, teacher = cut(text.encode(), ours), cut(text.encode(), theirs)

    def spans(tokens: list[bytes]) -> list[tuple[int, int]]:
        ends = list(itertools.accumulate(map(len, tokens)))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    expected = [spans(teacher).index(span) if span in spans(teacher) else None for span in spans(student)]
    assert matching(student, teacher) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (b"an answer", b"an answer", (0, 0, 9)),
        (b"an answer", b"  an answer", (0, 2, 9)),  # the student's template strips
        (b"an ans", b"an answer", (0, 0, 6)),  # the student's row was cut
        (b"the text so far an answer", b" an answer", (15, 0, 10)),  # plain text, continued
        (b"an answer", b"<s>user: a question\nbot: an answer", (0, 25, 9)),  # prompt_logprobs
        (b"something", b"else", (0, 0, 0)),
        (b"", b"x", (0, 0, 0)),
    ],
)
def test_overlap(student: bytes, teacher: bytes, expected: tuple[int, int, int]) -> None:
    assert overlap(student, teacher) == expected


def test_two_of_the_teachers_tokens_that_are_one_of_the_students_add_up() -> None:
    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    half = Candidate(b"b", math.log(0.25))
    position = Position(half, (half, Candidate(b"b", math.log(0.25)), Candidate(b"zzzzz", math.log(0.5))))
    signal, covered = align([a, b], [1], [position], vocabulary, 2)
    assert covered == 1
    assert signal.ids_TK[0].tolist() == [b, 0]
    np.testing.assert_allclose(signal.logprobs_TK, [[math.log(0.5), -np.inf], [-np.inf, -np.inf]], rtol=1e-6)


def test_behind_an_illegible_token_nothing_is_placed() -> None:
    tokenizer = build_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcd"]
    positions = [Position(c, (c,)) for c in (Candidate(t, -0.1) for t in (b"b", None, b"d"))]
    signal, covered = align(ids, [1, 2, 3], positions, Vocabulary(tokenizer), 1)
    assert covered == 1
    assert np.isfinite(signal.logprobs_TK[:, 0]).tolist() == [True, False, False, False]


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_finds_each_examples_signal_wherever_it_stands(packing: bool) -> None:
    rng = np.random.default_rng(0)
    examples = [rng.integers(3, 90, length).astype(np.int32) for length in (5, 9, 3, 7)]
    encoded = Encoded(input_ids=examples, labels=[ids.copy() for ids in examples], places=list("abcd"))
    signals = {ids.tobytes(): Signal(np.stack([ids + 1, ids + 2], 1), rng.normal(size=(len(ids), 2)).astype(np.float32)) for ids in examples[:3]}
    dataset = packed_dataset(encoded, 16) if packing else padded_dataset(encoded)
    batch = (PackedCollator(0) if packing else PaddedCollator(0))([dataset[i] for i in range(len(dataset))])
    ids_NK, logprobs_NK = signal_of(batch, signals, 2)
    flat = batch["input_ids"].reshape(-1)
    known = torch.isfinite(logprobs_NK[:, 0])
    assert int(known.sum()) == 5 + 9 + 3
    torch.testing.assert_close(ids_NK[known], torch.stack([flat[known] + 1, flat[known] + 2], 1))
    assert sorted(logprobs_NK[known, 0].tolist()) == sorted(float(v) for s in signals.values() for v in s.logprobs_TK[:, 0])
