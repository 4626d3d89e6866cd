"""Finding and loading: converted once however many ask, refused when unsafe, the compute type chosen by the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmlite.errors import LoadError, ResourceError
from llmlite.models import gguf as gguf_files
from llmlite.models.find import find
from llmlite.models.load import compute_dtype, load_config, load_model, load_tokenizer, require_matching
from llmlite.models.settings import DEFAULT_MODEL, Model
from llmlite.storage import damage, writing_folder
from tests.conftest import build_tiny, save_tiny


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    """A file whose conversion is counted; what is converted is a stand-in, the locking and the cache are real."""
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_files, "_require_whole_gguf", lambda path: None)
    written: list[Path] = []

    def write(path: Path, folder: Path) -> None:
        written.append(folder)
        with writing_folder(folder) as temporary:
            (temporary / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_files, "_write_converted", write)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    return file, written


def test_a_gguf_file_is_converted_once_when_several_ask_at_the_same_time(gguf: tuple[Path, list[Path]]) -> None:
    file, written = gguf
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find(Model(name=str(file))).folder)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert found == written * 6
    assert damage(found[0]) is None


def test_a_damaged_conversion_is_made_again(gguf: tuple[Path, list[Path]]) -> None:
    file, written = gguf
    folder = find(Model(name=str(file))).folder
    (folder / "config.json").write_text("{ ")
    find(Model(name=str(file)))
    assert len(written) == 2
    assert damage(folder) is None


def test_another_file_of_the_same_name_is_converted_anew(gguf: tuple[Path, list[Path]]) -> None:
    file, written = gguf
    find(Model(name=str(file)))
    file.write_bytes(b"GGUF and more")
    find(Model(name=str(file)))
    assert len(set(written)) == 2


@pytest.fixture
def slow_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], threading.Event]]:
    """A Hub that hands over config.json at once, the tokenizer when it is told to, and counts; what it gives lies in the cache as the client lays it out."""
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked: list[str] = []
    go_on = threading.Event()

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        folder = repo / "snapshots" / "0a1b2c"
        folder.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text("0a1b2c")
        (folder / "config.json").write_text("{}")
        if not go_on.wait(20):
            raise OSError("the connection was lost")
        (folder / "tokenizer.json").write_text("{}")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    yield asked, go_on
    go_on.set()


def test_of_two_that_want_a_model_one_downloads_it_and_the_other_waits_for_all_of_it(slow_hub: tuple[list[str], threading.Event], tmp_path: Path) -> None:
    asked, go_on = slow_hub
    found: list[set[str]] = []

    def want() -> None:
        found.append({path.name for path in find(Model(name="team/slow"), weights=False).folder.iterdir()})

    threads = [threading.Thread(target=want) for _ in range(2)]
    threads[0].start()
    while not list(tmp_path.glob("hub/*/snapshots/*/config.json")):
        time.sleep(0.01)
    threads[1].start()
    threads[1].join(0.5)
    assert found == []
    go_on.set()
    for thread in threads:
        thread.join()
    assert asked == ["team/slow"]
    assert found == [{"config.json", "tokenizer.json"}] * 2


def test_a_download_that_was_killed_behind_the_config_goes_on(slow_hub: tuple[list[str], threading.Event], tmp_path: Path) -> None:
    asked, go_on = slow_hub
    folder = tmp_path / "hub" / "models--team--slow" / "snapshots" / "0a1b2c"
    for file, text in ((folder / "config.json", "{}"), (folder.parents[1] / "refs" / "main", "0a1b2c")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    go_on.set()
    assert (find(Model(name="team/slow"), weights=False).folder / "tokenizer.json").is_file()
    find(Model(name="team/slow"), weights=False)
    assert asked == ["team/slow"]


def test_a_sharded_folder_with_a_shard_missing_is_refused(tmp_path: Path) -> None:
    build_tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(LoadError, match=f"lacks 1 of {len(shards)} weight files, first {shards[1].name}"):
        find(Model(name=str(tmp_path)))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), OSError(12, "Cannot allocate memory"), MemoryError()])
def test_a_model_that_does_not_fit_into_memory_is_told_with_what_to_try(error: Exception, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(ResourceError, match=r"does not fit into memory \(.*emory.*\)\. .* load: blocks; device_map: auto .* dtype: bfloat16"):
        load_model(model_folder, Model(), torch.device("cpu"))


def test_weights_that_do_not_fit_their_config_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=2)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(LoadError, match="weights that its config asks for"):
        load_model(folder, Model(), torch.device("cpu"))


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", vocab_size=300)
    source = find(Model(name=str(folder)))
    with pytest.raises(LoadError, match=r"tokens and its embedding 300"):
        require_matching(load_tokenizer(source, Model()), load_config(source, Model()))


def test_an_adapter_folder_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match="holds an adapter, not a model"):
        find(Model(name=str(tmp_path)))


def test_the_compute_type_follows_the_device_unless_asked() -> None:
    assert compute_dtype(torch.device("cpu")) == torch.float32
    assert compute_dtype(torch.device("cpu"), "bfloat16") == torch.bfloat16


@pytest.mark.slow
def test_the_offline_default_answers_a_question() -> None:
    source = find(Model())
    assert source.hub_id == DEFAULT_MODEL
    tokenizer: Any = load_tokenizer(source, Model())
    model = load_model(source, Model(), torch.device("cpu"))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
