"""A learned table of positions ends: whatever writes behind a text, or reads one, stays within what the table and a prefix leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM, BloomConfig

import llmlite
from llmlite.cli import main
from llmlite.data.text import Rows
from llmlite.errors import ConfigError
from llmlite.evaluation.sample import sample
from llmlite.evaluation.speed import measure_latency
from llmlite.evaluation.tasks import run_tasks
from llmlite.hub.verify import _SCRIPT
from llmlite.models.adapted import longest_of, longest_text, tokens_left
from tests.conftest import build_tiny, build_tokenizer, save_sums_task, save_tiny, tiny_config

LEARNED = ("gpt2", "opt")
FIRST = 16  # virtual tokens before every text
SMALL: dict[str, Any] = {"batch_sizes": (1,), "repeats": 1}


def with_prefix(model: Any, tokens: int = FIRST) -> Any:
    return peft.get_peft_model(model, llmlite.Prefix(num_virtual_tokens=tokens).peft_config(model.config)).eval()


def question(words: int) -> Rows:
    return Rows("pair", [{"prompt": "a " * words, "completion": "b"}], ["here"], "here", None, "pairs", 1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are longer than any model here reads."""
    file = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"The answer of {number} is the answer of the question. " * 4}) + "\n" for number in range(200)))
    return file


@pytest.fixture(scope="module", params=LEARNED)
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions."""
    return save_tiny(tmp_path_factory.mktemp("narrow") / request.param, request.param, max_position_embeddings=64)


@pytest.fixture(scope="module")
def prefixed(narrow: Path) -> Path:
    """A prefix for it as stock peft saves it, which leaves 48."""
    folder = narrow.with_name("prefix")
    with_prefix(AutoModelForCausalLM.from_pretrained(narrow)).save_pretrained(folder)
    return folder


def test_what_is_left_is_the_positions_without_the_prefix_and_the_text() -> None:
    config = tiny_config("gpt2", max_position_embeddings=64)
    model = with_prefix(build_tiny("gpt2", max_position_embeddings=64))
    assert (longest_of(config), longest_of(config, FIRST), longest_text(model)) == (64, 48, 48)
    assert [tokens_left(model, read, 10) for read in (0, 38, 40, 48, 60)] == [10, 10, 8, 0, 0]
    without_limit = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=8))  # positions by a slope
    assert longest_text(without_limit) is None
    assert tokens_left(without_limit, 1000, 10) == 10


@pytest.mark.parametrize("family", LEARNED)
def test_an_answer_ends_where_the_positions_end_and_a_prompt_that_takes_all_is_not_asked(family: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    model = with_prefix(build_tiny(family, vocab_size=320, max_position_embeddings=64, eos_token_id=None))
    asked = {words: len(tokenizer("a " * words)["input_ids"]) for words in (8, 20, 24)}
    assert asked == {8: 16, 20: 40, 24: 48}
    lengths = []
    real = model.generate
    model.generate = lambda **inputs: lengths.append(real(**inputs)) or lengths[-1]
    for words, read in asked.items():
        found = sample(model, tokenizer, question(words))
        if read < 48:
            assert lengths[-1].shape[1] == 48
            assert "not asked" not in found["answer"]
        else:
            assert len(lengths) == 2
            assert found["answer"] == "[not asked: the prompt has 48 tokens, and the model reads 48 with its answer]"


@pytest.mark.parametrize("family", LEARNED)
def test_speed_is_measured_on_fewer_tokens_where_there_are_few_positions(family: str) -> None:
    found = measure_latency(with_prefix(build_tiny(family, max_position_embeddings=26)), repeats=1)
    assert (found.prompt_tokens, found.new_tokens) == (1, 9)


def test_a_prefix_is_measured_beside_its_base_within_the_positions(narrow: Path, prefixed: Path, texts: Path, tmp_path: Path) -> None:
    found = llmlite.evaluate(prefixed, base=str(narrow), data=str(texts), answers=2, **SMALL)
    assert found.models["this"]["tokens"] == found.models["base"]["tokens"] > 0
    assert len(found.models["this"]["answers"]) == 2
    (tmp_path / "text.txt").write_text("What is the answer? It is the answer of the question. " * 20)
    found = llmlite.evaluate(prefixed, base=str(narrow), text=str(tmp_path / "text.txt"), answers=0, **SMALL)
    assert "sliding window of 48, stride 24" in found.about["quality_on"]


def test_a_window_beyond_the_positions_is_refused_before_anything_is_loaded(
    narrow: Path, prefixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is the answer? It is the answer of the question. " * 20)
    monkeypatch.setattr("llmlite.context.Run.load_base", lambda _: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"window=65 should be at most 64, all that .* reads at a time\. Lower window, or leave it out"):
        llmlite.evaluate(narrow, base=str(narrow), text=str(text), window=65)
    with pytest.raises(ConfigError, match="stride=48 should be at least 1 and below the window of 48 tokens, all that .* positions of a prefix not counted"):
        llmlite.evaluate(prefixed, base=str(narrow), text=str(text), stride=48)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(prefixed), "--base", str(narrow), "--text", str(text), "--window", "49"])
    assert stopped.value.code == 2
    assert "window=49 should be at most 48" in capsys.readouterr().err
    recipe = llmlite.Recipe(
        model=str(narrow),
        data=llmlite.Data(max_length=32, packing=False),
        steps=[llmlite.Prefix(num_virtual_tokens=FIRST)],
        evaluate={"text": str(text), "window": 49},
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(ConfigError, match="window=49 should be at most 48, .* positions of a prefix not counted"):
        recipe.check()


def test_a_task_that_asks_for_longer_answers_than_there_are_positions_says_so(narrow: Path, tmp_path: Path) -> None:
    task = save_sums_task(tmp_path / "sums.yaml")
    task.write_text(
        task.read_text()
        .replace("multiple_choice", "generate_until")
        .replace("doc_to_choice: choices\n", "")
        .replace("metric: acc", "metric: exact_match")
        .replace("doc_to_target: gold", "doc_to_target: '{{gold}}'")
    )
    model, tokenizer = with_prefix(AutoModelForCausalLM.from_pretrained(narrow)), build_tokenizer()
    with pytest.raises(ConfigError, match=r"tiny_sums: .* the model reads and writes 48 tokens together\. Lower max_gen_toks"):
        run_tasks(model, tokenizer, [str(task)], limit=2)
    task.write_text(task.read_text() + "generation_kwargs: {max_gen_toks: 40, until: []}\n")
    (found,) = run_tasks(model, tokenizer, [str(task)], limit=2)  # whose prompts are cut
    assert found.metric == "exact_match"


def test_a_run_with_a_prefix_that_leaves_few_positions_answers_is_timed_and_reloads(narrow: Path, texts: Path, tmp_path: Path) -> None:
    steps = [llmlite.Prefix(num_virtual_tokens=40, max_steps=1, per_device_train_batch_size=2)]
    data = llmlite.Data(train=str(texts), max_length=24, packing=False, evaluation_rows=2)
    report = llmlite.Recipe(model=str(narrow), data=data, steps=steps, output_dir=str(tmp_path / "out")).run()
    assert report.reload_difference == 0.0
    assert report.rows[-1].decode_tokens_per_second is not None
    assert "[not asked: the prompt has" in report.rows[-1].details["sample"]["answer"]


def test_a_folder_and_its_repository_are_compared_within_the_positions_that_a_prefix_leaves(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "gpt2", max_position_embeddings=40)
    with_prefix(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "prefix")
    lines = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, BloomConfig\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(tmp_path / 'prefix')!r})"
    )
    done = subprocess.run([sys.executable, "-c", _SCRIPT, lines, lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["difference"] == 0.0
