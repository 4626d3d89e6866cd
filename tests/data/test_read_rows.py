from __future__ import annotations

import gzip
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llmlite.data.text import check_source, read_rows, read_splits
from llmlite.errors import DataError

PAIRS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(40)]


def _jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str):
    import pandas as pd

    path = tmp_path / f"rows{suffix}"
    plain = tmp_path / f"rows{suffix.removesuffix('.gz')}"
    frame = pd.DataFrame(PAIRS)
    match plain.suffix:
        case ".jsonl":
            _jsonl(plain, PAIRS)
        case ".json":
            plain.write_text(json.dumps(PAIRS))
        case ".csv":
            frame.to_csv(plain)  # with pandas' index column
        case ".tsv":
            frame.to_csv(plain, sep="\t", index=False)
        case ".parquet":
            frame.to_parquet(plain)
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    rows = read_rows(path, None)
    assert list(rows.rows) == PAIRS
    assert check_source(path).kind == "pair"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"content": "a"}, "text"),
        ({"instruction": "a", "output": "b"}, "pair"),
        ({"question": "a", "answer": "b"}, "pair"),
        ({"query": "a", "response": "b"}, "pair"),
        ({"Q": "a", "A": "b", "label": 0}, "pair"),
        ({"input": "a", "output": "b"}, "pair"),
        ({"instruction": "a", "output": "b", "text": "a and b"}, "pair"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "chat"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "chat"),
        ({"prompt": "a", "completion": "b", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "chat"),
    ],
)
def test_usual_column_names_are_understood(tmp_path: Path, record: dict[str, object], kind: str):
    rows = read_rows(_jsonl(tmp_path / "rows.jsonl", [record]), None)
    assert rows.kind == kind
    expected = {
        "text": {"text": "a"},
        "pair": {"prompt": "a", "completion": "b"},
        "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    }
    assert rows.rows[0] == expected[kind]


def test_alpaca_input_joins_the_instruction_and_a_system_column_stays(tmp_path: Path):
    rows = read_rows(_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Translate", "input": "Hund", "output": "dog", "system": "Be brief"}]), None)
    assert rows.rows[0] == {"prompt": "Translate\n\nHund", "completion": "dog", "system": "Be brief"}


def test_messages_may_be_json_in_a_csv_cell_or_lists_of_text_parts(tmp_path: Path):
    import pandas as pd

    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b", "name": None}]
    pd.DataFrame({"messages": [json.dumps(messages)]}).to_csv(tmp_path / "rows.csv", index=False)
    assert read_rows(tmp_path / "rows.csv", None).rows[0] == {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_named_columns_win(tmp_path: Path):
    path = _jsonl(tmp_path / "rows.jsonl", [{"text": "t", "ask": "a", "reply": "b"}])
    assert read_rows(path, None, prompt_column="ask", completion_column="reply").rows[0] == {"prompt": "a", "completion": "b"}
    assert read_rows(path, None, text_column="reply").rows[0] == {"text": "b"}
    with pytest.raises(DataError, match=r"prompt_column='aks'.*Did you mean 'ask'"):
        check_source(path, prompt_column="aks", completion_column="reply")
    with pytest.raises(DataError, match="exclude each other"):
        check_source(path, prompt_column="ask", text_column="text")
    with pytest.raises(DataError, match="name completion_column as well"):
        check_source(path, prompt_column="ask")


def test_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path: Path):
    for name, text in {
        "rows.jsonl": '{"text": "a"}\r\n{"text": "b"}\r\n',
        "rows.csv": "text,n\r\na,1\r\nb,2\r\n",
        "rows.json": '[{"text": "a"}, {"text": "b"}]',
    }.items():
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row["text"] for row in read_rows(path, None).rows] == ["a", "b"]


def test_json_may_be_lines_a_wrapped_list_or_columns(tmp_path: Path):
    path = tmp_path / "rows.json"
    for text in ('{"text": "a"}\n{"text": "b"}\n', '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', '{"text": ["a", "b"]}'):
        path.write_text(text)
        assert [row["text"] for row in read_rows(path, None).rows] == ["a", "b"]


def test_csv_fields_may_be_long_quoted_and_separated_by_semicolons(tmp_path: Path):
    path = tmp_path / "rows.csv"
    long = "x" * 300_000
    path.write_text(f'question;answer\n"two\nlines; and ""quotes""";{long}\n')
    assert read_rows(path, None).rows[0] == {"prompt": 'two\nlines; and "quotes"', "completion": long}


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path):
    generator = random.Random(0)
    paragraphs = ["\n".join("word " * generator.randint(1, 30) for _ in range(generator.randint(1, 20))) for _ in range(60)]
    paragraphs.append("\n".join("one line of an overlong paragraph" for _ in range(1000)))
    text = "\n\n".join(paragraphs)
    (tmp_path / "book.txt").write_text(text)
    rows = read_rows(tmp_path / "book.txt", None)
    assert "".join("".join(row["text"].split()) for row in rows.rows) == "".join(text.split())
    assert max(len(row["text"]) for row in rows.rows) < 8000
    lines = text.split("\n")
    for row, place in zip(rows.rows, rows.places, strict=True):
        assert lines[int(place.rsplit(" ", 1)[1]) - 1] == row["text"].split("\n")[0]


BAD_FILES = {
    "empty.jsonl": (b"", r"empty \(0 bytes\)"),
    "blank.jsonl": (b"\n \n", "no rows"),
    "header.csv": (b"text,n\n", "no rows"),
    "blank_rows.jsonl": (b'{"text": " "}\n{"text": null}\n', "all 2 rows are blank|no usable row"),
    "comma.jsonl": (b'{"text": "a"}\n\n{"text": "b",}\n', r"comma\.jsonl line 3, column \d+"),
    "list.jsonl": (b'["a"]\n', "line 1 is a list"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"latin\.jsonl line 2, byte 14: 0xe9 is not UTF-8"),
    "latin.csv": (b"text,n\na,1\ncaf\xe9,2\n", r"latin\.csv line 3, byte 4: 0xe9"),
    "latin.txt": (b"a\ncaf\xe9\n", r"latin\.txt line 2, byte 4"),
    "wide.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "is UTF-16"),
    "unmarked.txt": ("text of plain English\n".encode("utf-16-le"), r"unmarked\.txt line 1 holds a NUL byte.*UTF-16"),
    "nul.jsonl": (b'{"text": "a"}\n{"text": "b\0"}\n', r"nul\.jsonl line 2 holds a NUL byte"),
    "half.jsonl": (rb'{"text": "a\ud83d"}' + b"\n", r"half\.jsonl line 1, column 'text': '\\ud83d' at character 2 is half of a character"),
    "half_chat.jsonl": (rb'{"messages": [{"role": "assistant", "content": "\ude00"}]}' + b"\n", r"line 1, message 1: '\\ude00' at character 1 is half"),
    "half_call.jsonl": (rb'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"name": "\ud83d"}]}]}' + b"\n", "message 1: .* is half"),
    "twice.csv": (b"text,text\na,b\n", r"twice\.csv line 1: the column 'text' is there twice"),
    "fields.csv": (b'question,answer\n"a\nb",c\nd,e,f\n', r"fields\.csv line 4: 3 fields, but the header has 2"),
    "quote.csv": (b'question,answer\na,"b\n', "quote left open"),
    "types.jsonl": (b'{"text": "a"}\n{"text": 42}\n', r"types\.jsonl line 2: column 'text' holds int \(42\); wanted text"),
    "absent.jsonl": (b'{"text": "a"}\n' * 30 + b'{"txt": "a"}\n', r"absent\.jsonl line 31 has no column 'text'"),
    "columns.jsonl": (b'{"choices": "a", "gold": 1}\n', r"no usable columns\. Found 'choices', 'gold'; understood are plain text \(text,"),
    "role.jsonl": (b'{"messages": [{"role": "pirate", "content": "a"}]}\n', r"line 1, message 1 has the role 'pirate'; understood are"),
    "string.jsonl": (b'{"messages": "hello"}\n', r"column 'messages' holds str \('hello'\)"),
    "image.jsonl": (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', "parts that are not text"),
    "broken.parquet": (b"PAR1 no more", "no readable Parquet"),
    "broken.json": (b'[{"text": "a"},\n {"text": ]', "line 2, column"),
    "broken.jsonl.gz": (b"not gzip", "broken gzip"),
    "data.xlsx": (b"PK", r"unknown kind of file '\.xlsx'; understood are \.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_say_what_is_wrong_and_where(tmp_path: Path, name: str):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name, None)
    if name != "absent.jsonl":  # too far down for a look at the first rows
        with pytest.raises(DataError, match=message):
            check_source(tmp_path / name)


def test_missing_files_are_answered_with_near_names(tmp_path: Path):
    _jsonl(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"no file or folder .*trian\.jsonl\. Did you mean .*train\.jsonl\?"):
        check_source(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"Data files there: train\.jsonl"):
        check_source(tmp_path / "zzz")
    with pytest.raises(DataError, match="There is no folder"):
        check_source(tmp_path / "nowhere" / "a.csv")
    with pytest.raises(DataError, match="Did you mean 'builtin:python-docs'"):
        check_source("builtin:python_docs")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        check_source(tmp_path / "void")


def test_a_hub_id_without_a_network_names_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    for ask in (check_source, read_splits):
        with pytest.raises(DataError, match=r"(?s)nobody/nothing.*cannot be reached.*hub-cache.*builtin:python-docs"):
            ask("nobody/nothing")


def test_blank_rows_are_left_out_counted_and_the_first_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = _jsonl(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "p", "completion": " "}, {"prompt": None, "completion": "c"}])
    with caplog.at_level(logging.WARNING):
        rows = read_rows(path, None)
    assert (rows.read, rows.blank, len(rows)) == (42, 2, 40)
    assert "2 of 42 rows are blank" in caplog.text
    assert "rows.jsonl line 41" in caplog.text


def test_chats_without_an_answer_count_as_blank(tmp_path: Path):
    ask = {"messages": [{"role": "user", "content": "a"}]}
    answered = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = read_rows(_jsonl(tmp_path / "rows.jsonl", [ask, answered]), None)
    assert (len(rows), rows.blank) == (1, 1)


def _contents(rows: object) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows.rows}  # type: ignore[attr-defined]


def test_splits_do_not_overlap_and_lose_nothing(tmp_path: Path):
    rows = [{"text": f"text {number % 700}"} for number in range(1000)]
    splits = read_splits(_jsonl(tmp_path / "rows.jsonl", rows), calibration_fraction=0.2, test_fraction=0.1)
    train, calibration, test = (_contents(splits[name]) for name in ("train", "calibration", "test"))
    assert not train & calibration
    assert not train & test
    assert not calibration & test
    assert train | calibration | test == {json.dumps(row) for row in rows}
    assert len(test) == len(splits["test"])  # no row twice
    assert splits["test"].duplicates > 0
    assert 0.05 < len(test) / 700 < 0.15
    assert 0.15 < len(calibration) / 700 < 0.25


def test_neither_order_nor_growth_moves_a_row_out_of_the_test(tmp_path: Path):
    rows = [{"text": f"text {number}"} for number in range(400)]
    before = _contents(read_splits(_jsonl(tmp_path / "a.jsonl", rows))["test"])
    random.Random(1).shuffle(rows)
    assert _contents(read_splits(_jsonl(tmp_path / "b.jsonl", rows))["test"]) == before
    assert _contents(read_splits(_jsonl(tmp_path / "c.jsonl", [*rows, *({"text": f"more {n}"} for n in range(400))]))["test"]) > before


@pytest.mark.parametrize("count", range(3, 12))
def test_small_files_still_fill_every_split(tmp_path: Path, count: int):
    splits = read_splits(_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {number}"} for number in range(count)]))
    assert all(len(rows) for rows in splits.values())
    assert sum(map(len, splits.values())) == count


def test_too_few_rows_to_split_is_an_error_and_fractions_of_zero_are_not(tmp_path: Path):
    path = _jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "a "}])
    with pytest.raises(DataError, match="1 different row cannot be shared out between training and calibration and test"):
        read_splits(path)
    splits = read_splits(path, calibration_fraction=0, test_fraction=0)
    assert (len(splits["train"]), len(splits["calibration"]), len(splits["test"])) == (2, 2, 0)
    with pytest.raises(DataError, match="together below 1"):
        read_splits(path, test_fraction=1.0)


def test_a_folder_keeps_its_own_splits_and_the_test_loses_what_training_holds(tmp_path: Path):
    _jsonl(tmp_path / "train-00.jsonl", PAIRS[:20])
    _jsonl(tmp_path / "train-01.jsonl", PAIRS[20:30])
    _jsonl(tmp_path / "validation.jsonl", [*PAIRS[28:], PAIRS[39]])
    (tmp_path / "README.md").write_text("about")
    splits = read_splits(tmp_path)
    assert len(splits["train"]) + len(splits["calibration"]) == 30
    assert _contents(splits["test"]) == {json.dumps(row, sort_keys=True) for row in PAIRS[30:]}
    assert splits["test"].duplicates == 3


def test_a_data_set_saved_by_datasets_is_read(tmp_path: Path):
    import datasets

    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS[:30]), "test": datasets.Dataset.from_list(PAIRS[30:])})
    both.save_to_disk(str(tmp_path / "saved"))
    splits = read_splits(tmp_path / "saved")
    assert (len(splits["train"]) + len(splits["calibration"]), len(splits["test"])) == (30, 10)
    assert check_source(tmp_path / "saved").kind == "pair"


def test_rows_of_another_file_are_taken_out_of_a_test(tmp_path: Path):
    train = read_rows(_jsonl(tmp_path / "a.jsonl", PAIRS[:30]), None)
    test = read_rows(_jsonl(tmp_path / "b.jsonl", [{"prompt": "QUESTION  3", "completion": "answer 3"}, *PAIRS[30:], PAIRS[35]]), None).without(train)
    assert list(test.rows) == PAIRS[30:]
    assert test.duplicates == 2


def test_a_sample_is_the_same_each_time_and_keeps_the_order(tmp_path: Path):
    rows = read_rows(_jsonl(tmp_path / "rows.jsonl", PAIRS), None)
    sample = rows.sample(10, seed=3)
    assert sample == rows.sample(10, seed=3) != rows.sample(10, seed=4)
    assert list(sample.places) == sorted(sample.places, key=lambda place: int(place.split()[-1]))
    assert rows.sample(100) is rows


def test_checking_imports_neither_torch_nor_transformers(tmp_path: Path):
    path = _jsonl(tmp_path / "rows.jsonl", PAIRS)
    look = f"from llmlite.data.text import check_source; check_source({str(path)!r})"
    code = f"import sys; {look}; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
