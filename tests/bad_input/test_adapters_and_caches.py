"""Broken adapters end with a message; broken caches are made again or end with a message. Nothing else comes out of either."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.calibration.sample import sampled_windows
from llmlite.distillation.api.cache import Answers, Spent
from llmlite.errors import LlmliteError
from llmlite.models.find import find
from llmlite.models.load import load_model
from llmlite.models.settings import Model

VALUES: list[Any] = [None, -1, "text", [], {}, 1.5, True]
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "last byte gone": lambda whole: whole[:-1],
    "a bit flipped": lambda whole: whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
    "random": lambda whole: os.urandom(len(whole)),
}


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(folder)
    return folder


def loaded(model_folder: Path, folder: Path) -> str:
    """ "good", or the message of the refusal; any other error is a failure of the test."""
    refused: LlmliteError | None = None
    try:
        llmlite.load_adapter(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    except LlmliteError as error:
        refused = error
    if refused is None:
        return "good"
    assert refused.exit_code == 2
    assert str(folder) in str(refused)
    return str(refused)


def test_every_value_of_an_adapters_config_replaced_is_refused_or_loads(model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    outcomes: Counter[bool] = Counter()
    for key, before in config.items():
        for value in VALUES:
            if value != before:
                (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
                outcomes[loaded(model_folder, folder) == "good"] += 1
    assert outcomes.total() > 200
    assert outcomes[False] > 50


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"peft_type": "NOTHING"}', b'{"peft_type": "LORA"}', b"\xff\xfe"], ids=range(8))
def test_an_adapters_config_that_is_none_is_refused(content: bytes, model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(content)
    assert loaded(model_folder, folder) != "good"


@pytest.mark.parametrize("kind", ["empty", "cut", "last byte gone", "random"])
def test_an_adapters_weights_that_are_damaged_are_refused(kind: str, model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    assert loaded(model_folder, folder) != "good"


def test_an_adapter_read_in_part_is_refused(model_folder: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "missing" in loaded(model_folder, folder)


def test_an_adapter_of_another_model_and_a_pickled_one_are_refused(model_folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import save_tiny

    assert loaded(save_tiny(tmp_path / "gpt2", "gpt2"), adapter) != "good"
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch harmed",)

    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harm()))
    assert "pickle" in loaded(model_folder, folder)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: you tried to allocate"), MemoryError()])
def test_no_memory_is_not_the_adapters_fault(error: Exception, model_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", full)
    with pytest.raises(type(error)) as raised:
        llmlite.load_adapter(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    assert raised.value is error


@pytest.mark.parametrize("kind", DAMAGE)
def test_sampled_text_that_is_damaged_is_sampled_again(kind: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    source = find(Model(name=str(model_folder)), weights=True)

    def windows() -> torch.Tensor:
        return sampled_windows(source, lambda: load_model(source, Model(), torch.device("cpu")), 2, 16, seed=0, dtype=torch.float32)

    whole = windows()
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(DAMAGE[kind](file.read_bytes()))
    assert torch.equal(windows(), whole)


@pytest.mark.parametrize("kind", ["cut", "random"])
def test_a_file_of_answers_that_is_damaged_ends_with_a_message_or_asks_again(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    answers = Answers(file)
    for number in range(50):
        answers.add(str(number), "teacher", {"n": number}, {"choices": [str(number) * 200]}, Spent(1, 1, 1), "run")
    answers.close()
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    found: list[Any] = []
    try:
        answers = Answers(file)
        found = [answers.get(str(number)) for number in range(50)]
    except LlmliteError as error:
        found = [error]
    for body in found:
        assert body is None or (isinstance(body, dict) and body["choices"]) or (body.exit_code == 2 and "answers.sqlite" in str(body))


@pytest.mark.parametrize("kind", ["zeros", "random", "another page"])
def test_every_damaged_page_of_a_file_of_answers_ends_with_a_message_or_asks_again(kind: str, tmp_path: Path) -> None:
    """Of a file of some size, whose first page is whole, so that it opens."""
    source, page, outcomes = random.Random(0), 4096, Counter[str]()
    file = tmp_path / "answers.sqlite"
    answers = Answers(file)
    for number in range(150):
        answers.add(str(number), "teacher", {"n": number}, {"choices": [source.randbytes(500).hex()]}, Spent(1, 1, 1), "run")
        answers.add_failed(str(number), "run")
    answers.close()
    whole = file.read_bytes()
    assert len(whole) > 100_000
    fill = {"zeros": bytes(page), "random": source.randbytes(page), "another page": whole[page : 2 * page]}[kind]
    for start in range(page, len(whole), page):
        for beside in tmp_path.glob("answers.sqlite-*"):
            beside.unlink()
        damaged = whole[:start] + fill + whole[start + page :]
        file.write_bytes(damaged)
        try:
            answers = Answers(file)
        except LlmliteError:
            outcomes["refused"] += 1
            continue
        for use in (lambda kept: [kept.get(str(n)) for n in range(150)], lambda kept: kept.spent("run"), len, _add):
            refused: LlmliteError | None = None
            try:
                use(answers)
            except LlmliteError as error:
                refused = error
            outcomes["fine" if refused is None else "refused"] += 1
            if refused is not None:
                assert "answers.sqlite" in str(refused)
                assert refused.exit_code == 2
        answers.close()
    assert outcomes["refused"] > 0


def _add(answers: Answers) -> None:
    answers.add("new", "teacher", {}, {}, Spent(), "run")
    answers.add_failed("new", "run")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", "null", '{"rows": 3}', '{"rows": [{}]}', "[" * 3000], ids=range(9))
@pytest.mark.parametrize("file", ["adapter_config.json", "report.json"])
@pytest.mark.parametrize("command", ["evaluate", "compare", "push", "export"])
def test_a_result_whose_files_are_broken_ends_with_a_message(
    command: str,
    file: str,
    content: str,
    model_folder: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llmlite.cli import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "recipe.yaml").write_text("steps: [{step: lora}]\n")
    (folder / file).write_text(content)
    words = {
        "evaluate": [str(folder), "--base", str(model_folder)],
        "compare": [str(folder)],
        "push": [str(folder), "me/name"],
        "export": [str(folder), str(adapter), "--output_dir", str(tmp_path / "out")],
    }
    with pytest.raises(SystemExit) as ended:
        main([command, *words[command]])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.strip()
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
