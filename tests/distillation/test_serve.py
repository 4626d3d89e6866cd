"""A teacher of one's own: `transformers serve` on loopback, started and stopped by the step, gone when the run is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmlite
from llmlite.context import Run
from llmlite.distillation.api.asking import Asking, probed
from llmlite.distillation.api.client import Client
from llmlite.distillation.api.serve import served
from llmlite.distillation.api.teacher import ApiTeacher
from llmlite.errors import ApiError, ConfigError
from tests.conftest import randomise, save_tiny


@pytest.fixture(scope="module")
def url(teacher_folder: Path) -> Iterator[str]:
    with served(teacher_folder, "cpu", "float32") as address:
        yield address
    with socket.socket() as probe:  # and now nobody is there
        assert probe.connect_ex(("127.0.0.1", urlsplit(address).port or 0)) != 0


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_it_answers_as_the_model_does(url: str, teacher_folder: Path, endpoint: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher_folder).eval(), AutoTokenizer.from_pretrained(teacher_folder)
    chat = [{"role": "user", "content": "What is 5 plus 6?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) if endpoint == "chat" else "What is 5 plus 6?"
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    asked = {"messages": chat} if endpoint == "chat" else {"prompt": "What is 5 plus 6?"}
    raw = Client(url, None, 60.0, 0).ask(endpoint, {"model": str(teacher_folder), "max_tokens": 24, "temperature": 0.0, **asked})  # type: ignore[arg-type]
    choice = raw.body["choices"][0]
    assert (choice["message"]["content"] if endpoint == "chat" else choice["text"]) == expected
    assert raw.body["usage"]["completion_tokens"] > 0


def test_that_it_ignores_logprobs_is_noticed(url: str, teacher_folder: Path) -> None:
    asking = Asking(str(teacher_folder), "top_logprobs", 5, 16, 0.0)
    client = Client(url, None, 60.0, 0)
    with pytest.raises(ApiError, match="silently leaves the log-probabilities out"):
        probed(client, asking, "chat", downgrade=False)
    assert probed(client, asking, "chat", downgrade=True)[0].mode == "text"


def test_a_step_serves_its_teacher_while_it_asks_and_only_then(
    teacher_folder: Path, model_folder: Path, questions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    step = llmlite.DistillBlackBox(teacher=f"serve:{teacher_folder}", max_answer_tokens=32, max_steps=2)
    data = llmlite.Data(train=str(questions_file), max_length=96, evaluation_rows=2, max_train_rows=6)
    recipe = llmlite.Recipe(model=str(model_folder), data=data, steps=[step], output_dir=str(tmp_path / "out"))
    assert "served on loopback" in " ".join(recipe.check().rows[-1]["notes"])
    before = children()
    for asked, cached in ((6, 0), (0, 6)):
        run = Run(recipe, scratch=tmp_path / f"scratch-{asked}")
        run.scratch.mkdir()
        step.apply(run.load_base(), run)
        assert (run.notes["collecting"].get("asked", 0), run.notes["collecting"]["from_cache"]) == (asked, cached)
        assert children() == before


def test_a_teacher_is_asked_for_no_more_than_it_has_positions_for(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    teacher = save_tiny(tmp_path / "gpt2", "gpt2", max_position_embeddings=64)
    randomise(AutoModelForCausalLM.from_pretrained(teacher)).save_pretrained(teacher)  # answers that are not blank
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "a " * words}) + "\n" for words in (4, 16, 30, 31)))
    step = llmlite.DistillBlackBox(
        teacher=f"serve:{teacher}", prompts=str(tmp_path / "prompts.jsonl"), endpoint="completions", max_answer_tokens=40, truncated="cut", max_retries=0
    )
    recipe = llmlite.Recipe(model=str(model_folder), data=llmlite.Data(max_length=96), steps=[step], output_dir=str(tmp_path / "out"))
    run = Run(recipe, scratch=tmp_path)
    asker = ApiTeacher(step, run)
    placed = asker.with_room(asker.questions())
    assert [(question.room, asker.asking.body(question)["max_tokens"]) for question in placed] == [(54, 40), (30, 30), (2, 2)]
    assert "1 question is not asked" in caplog.text
    assert "row 4: of the 64 tokens that the teacher reads and writes together, none is left" in caplog.text
    step._collect(run)
    assert (run.notes["collecting"]["asked"], run.notes["collecting"].get("unanswered", 0)) == (3, 0)


def test_what_is_kept_of_its_answers_is_of_its_template_and_configs_too(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(model_folder, folder)
    step = llmlite.DistillBlackBox(teacher=f"serve:{folder}")

    def identity() -> str:
        return ApiTeacher(step, Run(llmlite.Recipe(steps=[step]))).identity

    found = [identity(), identity()]
    assert found[0] == found[1]
    (folder / "README.md").write_text("A note, which changes no answer.")
    assert identity() == found[0]
    for name, text in (("generation_config.json", '{"repetition_penalty": 1.3}'), ("config.json", "{}"), ("chat_template.jinja", "{{ messages[0].content }}")):
        (folder / name).write_text(text)
        found.append(identity())
    assert len(set(found)) == 4


def test_what_cannot_be_served_is_refused(model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    def check(**options: object) -> None:
        llmlite.Recipe(
            model=str(model_folder), data=str(questions_file), max_length=96, steps=[llmlite.DistillBlackBox(**options)], output_dir=str(tmp_path / "x")
        ).check()

    with pytest.raises(ConfigError, match="transformers serve returns no log-probabilities"):
        check(mode="top_logprobs")
    with pytest.raises(llmlite.LlmliteError, match="no folder"):
        check(teacher="serve:./nowhere/at/all")


@pytest.mark.slow
def test_a_server_that_does_not_come_up_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ApiError, match="did not come up for broken"), served(broken, "cpu", "float32"):
        pass


def children() -> list[str]:
    """Command lines of this process's children that serve."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if int((place / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found += [line for line in [(place / "cmdline").read_bytes().replace(b"\0", b" ").decode()] if " serve " in line]
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_kill_of_the_run_ends_the_server_too(teacher_folder: Path) -> None:
    program = f"""
import time
from pathlib import Path
from llmlite.distillation.api.serve import served
from llmlite.distillation.api.teacher import ApiTeacher
with served(Path({str(teacher_folder)!r}), "cpu", "float32") as url:
    print(url, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = urlsplit(process.stdout.readline().strip()).port or 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.1)
    pytest.fail("the server outlived the run")
