"""The step distill.blackbox from the public door, against a server on loopback whose model is at hand to compare with."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

import llmlite
from llmlite.cli import recipe_main
from llmlite.context import Run
from llmlite.data.text import read_rows
from llmlite.distillation.api.teacher import ApiTeacher
from llmlite.errors import ApiError, ConfigError, RunError
from llmlite.recipes.distill_blackbox import DistillBlackBox as Preset
from tests.conftest import save_tiny
from tests.distillation.fake_api import FakeApi, serving

KEY = "sk-planted-7d1f0a9c55e24b"


@pytest.fixture(autouse=True)
def _no_key(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def served(teacher_folder: Path) -> Iterator[FakeApi]:
    with serving(FakeApi(teacher_folder, vllm=True)) as api:
        yield api


@pytest.fixture
def api(served: FakeApi) -> Iterator[FakeApi]:
    before = {name: value for name, value in vars(served).items() if isinstance(value, bool | int | float | str | None) or callable(value)}
    served.requests.clear()
    served.faults.clear()
    yield served
    vars(served).update(before)


def step(api: FakeApi, **options: Any) -> Any:
    values = {"max_answer_tokens": 40, "max_steps": 2, "learning_rate": 1e-3, "max_retries": 2, **options}
    return llmlite.DistillBlackBox(**{"teacher": "tiny", "base_url": api.url, **values})


def recipe(api: FakeApi, student: Path, data: Path, out: Path, **options: Any) -> Any:
    more = {name: options.pop(name) for name in ("max_length", "max_train_rows") if name in options}
    read = llmlite.Data(train=str(data), evaluation_rows=2, **{"max_length": 96, "max_train_rows": 12, **more})
    return llmlite.Recipe(model=str(student), data=read, steps=[step(api, **options)], output_dir=str(out))


def lesson(api: FakeApi, student: Path, data: Path, out: Path, **options: Any) -> Any:
    """What would be trained on, and the run."""
    made = recipe(api, student, data, out, **options)
    run = Run(made, scratch=out)
    out.mkdir(exist_ok=True)
    made.check()
    return made.steps[0]._lesson(run), run


def applied(api: FakeApi, student: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The figures of the step, without the rest of a run: measuring, saving, reloading."""
    made = recipe(api, student, data, out, **options)
    out.mkdir(exist_ok=True)
    run = Run(made, scratch=out)
    made.check()
    made.steps[0].apply(run.load_base(), run)
    return run.notes


# The three modes -----------------------------------------------------------------------------------------------------------------------


def test_text_trains_on_the_teachers_answers(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    notes = applied(api, model_folder, questions_file, tmp_path / "out", max_steps=25, learning_rate=5e-3, max_train_rows=24)
    losses = [entry["loss"] for entry in notes["train_loss"]]
    assert losses[-1] < 0.5 * losses[0]
    assert notes["collecting"]["asked"] == notes["answers"] == notes["used"]["requests"] == 24


@pytest.mark.parametrize("mode", ["top_logprobs", "prompt_logprobs"])
def test_the_signal_is_the_teachers_own_distribution(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path, mode: str) -> None:
    found, run = lesson(api, model_folder, questions_file, tmp_path / "out", mode=mode, top_logprobs=5)
    tokenizer = run.tokenizer
    checked = 0
    for key, told in found.signals.items():
        ids = torch.frombuffer(bytearray(key), dtype=torch.int32).long().tolist()
        covered = [t for t in range(len(ids)) if told.logprobs_TK[t].max() > -1e9]
        text = tokenizer.decode(ids)
        prompt = text[: text.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert covered == [t - 1 for t in range(start, ids.index(tokenizer.eos_token_id, start))]
        logprobs_TV = api.logprobs(ids)
        for t in covered:
            expected = logprobs_TV[t].topk(5)
            mine = dict(zip(told.ids_TK[t].tolist(), told.logprobs_TK[t].tolist(), strict=True))
            for token, value in zip(expected.indices.tolist(), expected.values.tolist(), strict=True):
                assert mine[token] == pytest.approx(value, abs=1e-4)
            checked += 1
    assert checked == found.counts["covered_tokens"] > 80
    assert found.counts["unmapped"] == 0
    assert found.data.counts.trained_tokens - checked <= found.data.counts.examples  # all but the token that ends each answer


def test_prompt_logprobs_trust_the_ids_of_the_same_vocabulary(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    found, _ = lesson(api, model_folder, questions_file, tmp_path / "out", mode="prompt_logprobs", top_logprobs=20)
    assert found.counts["teacher_ids_are_the_students"] == 1


@pytest.mark.parametrize("mode", ["top_logprobs", "prompt_logprobs"])
def test_training_towards_the_signal_brings_the_student_nearer(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path, mode: str) -> None:
    options = {"mode": mode, "ce_weight": 0.0, "kd_weight": 1.0, "max_steps": 20, "learning_rate": 5e-3, "max_train_rows": 24}
    losses = [entry["loss"] for entry in applied(api, model_folder, questions_file, tmp_path / "out", **options)["train_loss"]]
    assert losses[-1] < 0.5 * losses[0]


def test_plain_text_is_continued_by_completions(api: FakeApi, model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"What is {n} plus {n + 1}? It is {2 * n + 1}, which is more than {n}."}) + "\n" for n in range(30)))
    found, run = lesson(api, model_folder, data, tmp_path / "out", mode="top_logprobs", top_logprobs=3, truncated="cut", max_train_rows=6, max_answer_tokens=5)
    assert all("prompt" in body for body in api.asked)
    answered = [body["prompt"] for body in api.asked]
    rows = [row["text"] for row in found.data.rows.rows]
    assert all(any(text.startswith(prompt) and len(text) > len(prompt) for text in rows) for prompt in answered)
    assert 0 < found.counts["covered_tokens"] <= found.data.counts.trained_tokens
    assert run.tokenizer.eos_token_id not in {label for row in found.data.dataset["labels"] for label in row}  # cut: no end is trained


def test_a_teacher_with_another_tokenizer_covers_what_both_cut_alike(api: FakeApi, questions_file: Path, tmp_path: Path) -> None:
    from tests.distillation.test_api_logprobs import sentencepiece_like

    folder = save_tiny(tmp_path / "student", vocab_size=400, bos_token_id=1)
    other = sentencepiece_like()
    other.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for file in folder.glob("tokenizer*"):
        file.unlink()
    other.save_pretrained(folder)
    found, _ = lesson(api, folder, questions_file, tmp_path / "out", mode="top_logprobs", top_logprobs=5, max_length=128)
    assert 0 < found.counts["covered_tokens"] < found.data.counts.trained_tokens
    assert found.counts["unmapped"] > 0
    assert 0 < found.counts["ambiguous"] < found.counts["mapped"]  # letters that are tokens and bytes
    assert found.counts["unplaced"] == 0


def test_an_adapter_can_be_the_student(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    made = recipe(api, model_folder, questions_file, tmp_path / "out", adapter="lora", mode="top_logprobs", top_logprobs=5)
    run = Run(made, scratch=tmp_path)
    planned = made.check().rows[1]
    model = made.steps[0].apply(run.load_base(), run)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == planned["trained_parameters"]
    assert any(float(parameter.detach().abs().max()) > 0 for name, parameter in trained.items() if "lora_B" in name)


def test_of_a_chat_only_the_last_turn_is_asked_and_trained(api: FakeApi, model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    turns = [("user", "What is 1 plus 2?"), ("assistant", "an early answer"), ("user", "What is 3 plus 4?"), ("assistant", "a late answer")]
    rows = [{"messages": [{"role": role, "content": f"{content}{n if role == 'user' else ''}"} for role, content in turns]} for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, run = lesson(api, model_folder, data, tmp_path / "out", max_train_rows=4, truncated="cut")
    trained = [run.tokenizer.decode([label for label in labels if label >= 0]) for labels in found.data.dataset["labels"]]
    assert all(body["messages"][-1]["role"] == "user" and len(body["messages"]) == 3 for body in api.asked)
    assert not any("early" in text or "late" in text for text in trained)


# What is left out ----------------------------------------------------------------------------------------------------------------------


def test_refusals_blanks_and_cut_answers_are_left_out_and_counted(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    kinds = iter([("Hello.", "stop"), ("I'm sorry, but I cannot say.", "stop"), ("", "stop"), ("  \n", "stop"), ("It is", "length"), ("no", "content_filter")])
    api.answer_with = lambda body: next(kinds, ("It is 7.", "stop"))
    notes = applied(api, model_folder, questions_file, tmp_path / "out", concurrency=1)
    wanted = {"refused": 2, "empty": 2, "truncated": 1}
    assert {name: notes["collecting"][name] for name in wanted} == wanted
    assert notes["answers"] == 12 - 5


def test_nothing_usable_says_why(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    api.answer_with = lambda body: ("It is", "length")
    with pytest.raises(ApiError, match="no answer is usable .*truncated 12.* raise max_answer_tokens, or set truncated: cut"):
        applied(api, model_folder, questions_file, tmp_path / "out")
    assert not (tmp_path / "out" / "collected.json").exists()  # a later start asks what is missing


def test_a_budget_trains_on_what_there_is(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    details = applied(api, model_folder, questions_file, tmp_path / "out", max_requests=5, input_price=1.0, output_price=2.0)
    assert (len(api.asked), details["answers"], details["collecting"]["stopped_by"]) == (5, 5, "max_requests")
    used = details["used"]
    assert used["cost"] == pytest.approx((used["prompt_tokens"] + 2 * used["completion_tokens"]) / 1e6) != 0


# What the server returns ---------------------------------------------------------------------------------------------------------------


def test_a_server_that_silently_drops_logprobs_is_refused_in_the_check(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    api.drop_logprobs = True
    with pytest.raises(ApiError, match="silently leaves the log-probabilities out. Use mode: text, let missing_logprobs: downgrade choose"):
        recipe(api, model_folder, questions_file, tmp_path / "out", mode="top_logprobs").check()
    assert not api.asked


def test_or_used_for_text_where_that_is_asked_for(
    api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api.drop_logprobs = True
    notes = applied(api, model_folder, questions_file, tmp_path / "out", mode="top_logprobs", missing_logprobs="downgrade")
    assert "Going on with text alone" in caplog.text
    assert (notes["mode"], notes["answers"]) == ("text", 12)


def test_more_logprobs_than_the_server_gives(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    api.most_logprobs = 5
    with pytest.raises(ApiError, match=r"must be at most 5.*it does return 5.*Set top_logprobs: 5"):
        recipe(api, model_folder, questions_file, tmp_path / "out", mode="top_logprobs", top_logprobs=20).check()
    found, _ = lesson(api, model_folder, questions_file, tmp_path / "o", mode="top_logprobs", top_logprobs=20, missing_logprobs="downgrade")
    assert {body["top_logprobs"] for body in api.asked} == {5}
    assert found.counts["covered_tokens"]


def test_prompt_logprobs_of_a_server_that_does_not_know_them(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    api.vllm = False
    with pytest.raises(ApiError, match="Unrecognized request argument.*prompt_logprobs is vLLM's"):
        recipe(api, model_folder, questions_file, tmp_path / "out", mode="prompt_logprobs").check()


def test_an_answer_whose_logprobs_are_missing_is_left_out(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    options = {"mode": "top_logprobs", "top_logprobs": 3}
    recipe(api, model_folder, questions_file, tmp_path / "out", **options).check()
    api.drop_logprobs = True  # after the probe
    with pytest.raises(ApiError, match="without_logprobs 12"):
        applied(api, model_folder, questions_file, tmp_path / "out", **options)


def test_the_servers_name_for_the_longest_answer_is_found_out(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    api.wants_completion_limit = True
    lesson(api, model_folder, questions_file, tmp_path / "out", max_train_rows=3)
    assert [("max_tokens" in body, body.get("max_completion_tokens")) for body in api.asked] == [(False, 40)] * 3


# Settings ------------------------------------------------------------------------------------------------------------------------------


def test_all_problems_come_together(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    options = {"mode": "prompt_logprobs", "prompts": str(questions_file), "samples_per_prompt": 2, "max_cost": 1.0, "refusals": "(", "api_key_env": "NOT_SET"}
    with pytest.raises(ConfigError) as caught:
        recipe(api, model_folder, questions_file, tmp_path / "out", **options).check()
    assert len(caught.value.problems) == 5
    assert all(word in str(caught.value) for word in ("NOT_SET", "prompts holds none", "samples_per_prompt", "max_cost", "regular expression"))


def test_a_student_whose_tokens_are_no_bytes_learns_from_text_only(api: FakeApi, questions_file: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "student")
    words = {"[UNK]": 0, "[PAD]": 1, "what": 2, "##s": 3, "plus": 4}
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece(words, unk_token="[UNK]")), unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    whole.save_pretrained(folder)
    with pytest.raises(ConfigError, match="cannot be read as bytes.*Use mode: text"):
        recipe(api, folder, questions_file, tmp_path / "out", mode="top_logprobs").check()


def test_base_url_without_a_teachers_name_lists_the_names(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    api.lists_models = True
    with pytest.raises(ConfigError, match=r"Say teacher: and the model's name at http.* \(tiny\)"):
        recipe(api, model_folder, questions_file, tmp_path / "out", teacher="serve:base").check()


def test_nobody_there_and_no_such_model(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="cannot be reached"):
        recipe(api, model_folder, questions_file, tmp_path / "out", base_url="http://127.0.0.1:9/v1").check()
    with pytest.raises(ApiError, match="The model 'huge' does not exist"):
        recipe(api, model_folder, questions_file, tmp_path / "out", teacher="huge").check()


def test_a_dry_run_asks_no_question(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"model": model_folder, "data": questions_file, "teacher": "tiny", "base_url": api.url, "max_length": 64, "output_dir": tmp_path / "o"}
    flags |= {"input_price": 1.0, "output_price": 1000.0, "max_answer_tokens": 100}
    recipe_main(Preset, [*(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--dry_run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"text from tiny at {api.url}" in shown
    questions = len(read_rows(str(questions_file), "train"))
    assert f"{questions} questions" in shown
    assert f"at most {questions * 100:,} to write; at most {questions * 0.1:.2f} for all of it" in shown
    assert not api.requests


def test_the_preset_prunes_only_when_the_model_is_its_own_teacher() -> None:
    assert [s.steps[0].keep for s in (Preset(), Preset(teacher="gpt"), Preset(teacher="gpt", keep=0.5), Preset(teacher="serve:base", seed=1))] == [
        0.9, 1.0, 0.5, 0.9,
    ]  # fmt: skip
    assert (Preset(teacher="gpt").steps[1].truncated, Preset(teacher="gpt", truncated="cut").steps[1].truncated) == ("drop", "cut")


def test_where_the_api_is_comes_from_the_option_then_the_environment_then_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    def url(**options: Any) -> str:
        made = llmlite.Recipe(steps=[llmlite.DistillBlackBox(teacher="x", **options)])
        return ApiTeacher(made.steps[0], Run(made)).url

    assert url() == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://env/v1/")
    assert (url(), url(base_url="http://option/v1")) == ("http://env/v1", "http://option/v1")


# The key, and the kill -----------------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_written_nowhere(
    teacher_folder: Path,
    model_folder: Path,
    questions_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_TEACHERS_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with serving(FakeApi(teacher_folder, key=KEY)) as api:
        api.answer_with = lambda body: (f"Your key is {KEY}.", "stop")  # and the server gives it away
        api.faults = [(500, {"retry-after-ms": "5"}, f"no luck with {KEY}")]
        report = recipe(api, model_folder, questions_file, tmp_path / "out", api_key_env="MY_TEACHERS_KEY", concurrency=2).run()
        assert {name.lower(): value for name, value in api.headers[0].items()}["authorization"] == f"Bearer {KEY}"
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    needle = KEY.encode()
    assert [file for file in written if needle in file.read_bytes()] == []
    from llmlite.distillation.api.cache import Answers

    cache = Answers(tmp_path / "cache" / "answers" / "answers.sqlite")
    unpacked = [cache.get(key) for (key,) in cache._database.execute("select key from answers").fetchall()]
    assert len(unpacked) == 13
    assert KEY not in json.dumps(unpacked)
    cache.close()
    assert report.reload_difference < 1e-4
    printed = "".join(capfd.readouterr())
    assert KEY not in caplog.text + printed + json.dumps(report.to_json(), default=str)
    assert "MY_TEACHERS_KEY" in (tmp_path / "out" / "recipe.yaml").read_text() or "MY_TEACHERS_KEY" in (tmp_path / "out" / "report.json").read_text()


def test_after_a_kill_nothing_answered_is_asked_again(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    api.slow_seconds = 0.15
    flags = {"model": model_folder, "data": questions_file, "teacher": "tiny", "base_url": api.url, "max_length": 96, "output_dir": tmp_path / "out"}
    flags |= {"max_answer_tokens": 40, "concurrency": 2, "max_train_rows": 24, "evaluation_rows": 2}
    command = [sys.executable, "-m", "llmlite.recipes.distill_blackbox", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while len(api.asked) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 8 <= len(api.asked) <= 10
    time.sleep(0.5)
    api.slow_seconds = 0.0
    probes = len(api.requests) - len(api.asked)
    notes = applied(api, model_folder, questions_file, tmp_path / "o", max_train_rows=24)
    times_asked = Counter(json.dumps(body["messages"]) for body in api.asked)
    assert len(times_asked) == notes["questions"] == 24
    assert sum(times_asked.values()) - 24 <= 2  # what was under way
    assert notes["collecting"]["from_cache"] >= 6
    assert len(api.requests) - len(api.asked) == probes == 1  # the probe neither


def test_a_run_stopped_in_its_training_goes_on_without_the_server(api: FakeApi, model_folder: Path, questions_file: Path, tmp_path: Path) -> None:
    from llmlite.distillation.blackbox import DistillBlackBox

    made = recipe(api, model_folder, questions_file, tmp_path / "out", mode="top_logprobs", top_logprobs=3)
    made.check()
    run = Run(made, scratch=tmp_path)
    with pytest.MonkeyPatch.context() as patch:

        def broken(self: Any, lesson: Any) -> Any:
            raise RunError("the power went")

        patch.setattr(DistillBlackBox, "loss_with", broken)
        with pytest.raises(RunError, match="power"):
            made.steps[0].apply(run.load_base(), run)
    before = len(api.requests)
    api.faults = [(500, {})] * 50
    made.steps[0].apply(run.load_base(), run)
    assert run.notes["collecting"]["from_cache"] == 12
    assert len(api.requests) == before
