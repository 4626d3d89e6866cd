"""Broken model folders, weights, tokenizers and data: a message with exit code 2 before or while loading, never another error; and attacks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import llmlite
from llmlite.errors import DataError, LlmliteError, LoadError
from llmlite.html.page import run_page
from llmlite.models.find import find
from llmlite.models.load import load_config, load_model, load_tokenizer
from llmlite.models.settings import Model
from llmlite.report import Report, Row
from tests.conftest import save_tiny

CONFIG_VALUES: list[Any] = [None, -1, 0, 7, "text", [], {}, 10**9, 1.5, True]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("good") / "model")


def copied(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


def checked_and_loaded(model: Path, rows: Path, out: Path) -> str:
    """Check a recipe on a folder, then load its weights. "good", or the message of the refusal; any other error is a failure of the test."""
    refused: LlmliteError | None = None
    try:
        llmlite.Recipe(model=str(model), data=str(rows), output_dir=str(out), steps=[llmlite.Lora(r=2)], max_length=32, evaluation_rows=2).check()
        load_model(find(Model(name=str(model))), Model(name=str(model)), torch.device("cpu"))
    except LlmliteError as error:
        refused = error
    assert not out.exists()
    if refused is None:
        return "good"
    assert refused.exit_code == 2
    assert str(refused).strip()
    assert "Traceback" not in str(refused)
    return str(refused)


def test_every_number_of_a_config_replaced_is_refused_or_loads(good: Path, pairs_file: Path, tmp_path: Path) -> None:
    config = json.loads((good / "config.json").read_text())
    folder = copied(good, tmp_path)
    outcomes = []
    for key, before in config.items():
        for value in CONFIG_VALUES:
            if value == before:
                continue
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            outcomes.append(checked_and_loaded(folder, pairs_file, tmp_path / "out"))
    assert len(outcomes) > 200
    assert sum(outcome != "good" for outcome in outcomes) > 60


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"12",
        b'"x"',
        b"{}",
        b'{"model_type": "llama"',
        b"\xff\xfe{}",
        b'{"model_type": "nothing-known"}',
        b'{"model_type": 3}',
        b'{"a":' * 3000,
    ],
    ids=range(12),
)
def test_a_config_that_is_none_is_refused(content: bytes, good: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    (folder / "config.json").write_bytes(content)
    assert checked_and_loaded(folder, pairs_file, tmp_path / "out") != "good"


def _header(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text


GENERATION_VALUES: list[Any] = [None, -5, 0, 3, 10**12, 1.5, "x", True, [], [1, "x"], [[]], {}]
GENERATION_KEYS = [
    "bos_token_id eos_token_id pad_token_id forced_eos_token_id suppress_tokens bad_words_ids max_length max_new_tokens min_length do_sample num_beams",
    "temperature top_k top_p repetition_penalty no_repeat_ngram_size use_cache stop_strings cache_implementation watermarking_config compile_config max_time",
]


def test_every_value_of_a_generation_config_is_refused_before_weights_load_or_answers(good: Path, tmp_path: Path) -> None:
    from llmlite.data.text import Rows
    from llmlite.evaluation.sample import sample

    folder = copied(good, tmp_path)
    source, model = find(Model(name=str(folder))), load_model(good, Model(), torch.device("cpu"))
    tokenizer = load_tokenizer(source, Model())
    rows = Rows("text", [{"text": "What does the function do? It returns the answer. " * 5}], ["row 1"], "rows", None, "text", 1)
    outcomes: Counter[bool] = Counter()
    for key in " ".join(GENERATION_KEYS).split():
        for value in GENERATION_VALUES:
            (folder / "generation_config.json").write_text(json.dumps({key: value}))
            refused: LlmliteError | None = None
            try:
                load_config(source, Model())
            except LlmliteError as error:
                refused = error
            outcomes[refused is None] += 1
            if refused is not None:
                assert "generation_config.json" in str(refused)
            else:
                model.generation_config = GenerationConfig.from_pretrained(folder)
                assert "answer" in sample(model, tokenizer, rows, new_tokens=2)
    assert outcomes.total() > 200
    assert outcomes[False] > 100


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"{", b"\xff\xfe{}", b'{"a":' * 3000], ids=range(7))
def test_a_generation_config_that_is_none_is_refused_before_weights_load(
    content: bytes, good: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(good, tmp_path)
    (folder / "generation_config.json").write_bytes(content)
    monkeypatch.setitem(globals(), "load_model", None)
    assert "generation_config.json" in checked_and_loaded(folder, pairs_file, tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        _header(2**63, b"{}"),
        _header(10**9, b"{}"),
        _header(2, b"[]"),
        _header(2, b"{}"),
        _header(16, b"not json at all!"),
        _header(70, b'{"x":{"dtype":"F32","shape":[9999999999999],"data_offsets":[0,4]}}    '),
        pickle.dumps({"x": 1}),
    ],
    ids=range(9),
)
def test_weights_that_are_damaged_or_made_to_harm_are_refused(content: bytes, good: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    assert checked_and_loaded(folder, pairs_file, tmp_path / "out") != "good"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_weights_cut_off_anywhere_are_refused(share: float, good: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert checked_and_loaded(folder, pairs_file, tmp_path / "out") != "good"


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "../other/model.safetensors",
        "/elsewhere/model.safetensors",
        "inside/model.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "a\0.safetensors",
        f"{'a' * 300}.safetensors",
        "gone.safetensors",
        None,
        3,
        [],
    ],
    ids=str,
)
def test_a_shard_index_that_leads_out_of_its_folder_is_refused_and_nothing_there_is_opened(
    name: Any, good: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    folder = copied(good, tmp_path)
    shutil.copytree(good, tmp_path / "other")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name, "model.norm.weight": "one.safetensors"}}))
    opened: list[Path] = []
    open_file = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda file, **options: opened.append(Path(file)) or open_file(file, **options))
    assert "index" in (said := checked_and_loaded(folder, pairs_file, tmp_path / "out")) or "lacks" in said
    assert all(file.parent == folder for file in opened)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 3}', '{"a":' * 3000], ids=range(7))
def test_a_shard_index_that_is_none_is_refused(content: str, good: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    assert checked_and_loaded(folder, pairs_file, tmp_path / "out") != "good"


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.7z"])
def test_archives_are_refused_and_nothing_is_unpacked(name: str, good: Path, pairs_file: Path, tmp_path: Path) -> None:
    archive = tmp_path / name
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("../../outside.txt", "out")
        for file in good.iterdir():
            written.write(file, file.name)
    before = sorted(tmp_path.rglob("*"))
    assert "is a file" in checked_and_loaded(archive, pairs_file, tmp_path / "out")
    assert name in checked_and_loaded(good, archive, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def test_a_pickle_is_never_opened(good: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(good, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Harm()))
    assert "pickle" in checked_and_loaded(folder, pairs_file, tmp_path / "out")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[["a","b"]]}}', b"\xff"], ids=range(6)
)
def test_a_tokenizer_that_is_damaged_is_refused(content: bytes, good: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    (folder / "tokenizer.json").write_bytes(content)
    assert checked_and_loaded(folder, pairs_file, tmp_path / "out") != "good"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch harmed') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ messages.append }}{{ lipsum.__globals__ }}",
    "{% for m in messages %}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_that_escapes_or_fails_ends_with_a_message(
    template: str, good: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(good, tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    recipe = llmlite.Recipe(
        model=str(folder), data=str(pairs_file), output_dir=str(tmp_path / "out"), steps=[llmlite.Lora(r=2)], max_length=32, evaluation_rows=2
    )
    from llmlite.context import Run

    with pytest.raises(LlmliteError) as refused:
        Run(recipe).evaluation_batches()
    assert refused.value.exit_code == 2
    assert not (tmp_path / "harmed").exists()


ROWS: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n\n",
    "cut.jsonl": b'{"text": "a"}\n{"text": "b',
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b"3\n",
    "latin.jsonl": b'{"text": "caf\xe9"}\n',
    "numbers.jsonl": b'{"text": 3}\n{"text": 4}\n',
    "nulls.jsonl": b'{"text": null}\n',
    "no_answer.jsonl": b'{"prompt": "a"}\n',
    "roles.jsonl": b'{"messages": [{"role": "nobody", "content": 3}]}\n',
    "only_user.jsonl": b'{"messages": [{"role": "user", "content": "hi"}]}\n',
    "empty_chat.jsonl": b'{"messages": []}\n',
    "other.jsonl": b'{"colour": "red"}\n',
    "deep_chat.csv": b'messages\n"' + b"[" * 20_000 + b'"\n',
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n",
    "digits.json": b'[{"text": ' + b"9" * 5000 + b"}]",
    "deep.json": b"[" * 20_000,
    "nan.json": b"[NaN]",
    "cut.json": b'[{"text": "a"},',
    "words.json": b"hello",
    "header.csv": b"prompt,completion\n",
    "ragged.csv": b"prompt,completion\na\nb,c,d\n",
    "quote.csv": b'prompt,completion\n"a,b\n',
    "no.parquet": b"PAR1",
    "zero.parquet": b"",
    "blank.txt": b"   \n",
    "binary.txt": bytes(range(256)),
    "unmarked.txt": "plain English. ".encode("utf-16-le"),
    "half.jsonl": rb'{"text": "an emoji cut in two: \ud83d"}' + b"\n",
    "twice.csv": b"text,text\na,b\n",
    "picture.png": b"\x89PNG",
}


@pytest.mark.parametrize("name", ROWS)
def test_data_that_cannot_be_used_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(ROWS[name])
    from llmlite.context import Run

    options: dict[str, Any] = {"model": str(good), "data": str(file), "output_dir": str(tmp_path / "out"), "max_length": 32, "evaluation_rows": 2}
    recipe = llmlite.Recipe(steps=[llmlite.Lora(r=2)], **options)
    with pytest.raises(DataError) as refused:
        recipe.check()
        Run(recipe).train_data  # noqa: B018
    assert name.partition(".")[0] in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_links_out_of_itself_publishes_nothing_from_there(good: Path, tmp_path: Path) -> None:
    from llmlite.hub.public import result_files

    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    folder = copied(good, tmp_path)
    (folder / "inside").symlink_to(secret)
    assert not any("inside" in str(path) for path in result_files(folder)[0])


def test_names_and_samples_cannot_write_html(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    row = Row(attack, 1, 1, 2.0, details={"sample": {"prompt": attack, "expected": attack, "answer": attack}})
    page = run_page(
        Report(tmp_path, {"model": {"name": attack}, "steps": [{"step": attack}]}, {"text": attack}, {"device": attack}, [row, row], loading=attack)
    )
    assert "<script>alert" not in page
    assert "<img src=x" not in page


def test_a_model_that_is_a_dangling_link_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    with pytest.raises(LoadError):
        find(Model(name=str(tmp_path / "model")))
