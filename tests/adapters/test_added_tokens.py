"""Tokens added to a model: tokenizer, embedding and head know them, adapters train their rows alone, and stock libraries load what comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmlite
from llmlite.errors import ConfigError
from llmlite.kept import load_result
from llmlite.models.added_tokens import fill_rows
from llmlite.quantization.bnb import Quantize
from tests.conftest import build_tiny, build_tokenizer, logits_of, save_tiny
from tests.snippets import snippet

TOKENS = ("<call>", "</call>")
SHORT: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2}
NF4 = Quantize(scheme="nf4", calibrate=False, report_sequences=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that use both tokens."""
    file = tmp_path_factory.mktemp("rows") / "calls.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f"<call>{n} plus one</call>"}) + "\n" for n in range(60)))
    return file


def recipe(model: Path, rows: Path, out: Path, *steps: Any, **options: Any) -> llmlite.Recipe:
    named = llmlite.Model(name=str(model), **{"add_tokens": TOKENS, **options})
    return llmlite.Recipe(model=named, data=str(rows), output_dir=str(out), steps=steps, max_length=64, evaluation_rows=4)


# What a stranger does with the folder: the saved tokenizer, the stock base with as many rows, stock peft. No llmlite in sight.
STRANGER = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
from safetensors.torch import save_file
base, adapter, out = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base)
model.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(model, adapter).eval()
ids = tokenizer("<call>What is 1?</call>", return_tensors="pt")["input_ids"]
with torch.no_grad():
    save_file({"ids": ids, "logits": model(input_ids=ids).logits}, out)
assert not any(name.startswith("llmlite") for name in sys.modules)
"""


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False)])
def test_an_adapter_on_the_stock_base_with_more_rows_gives_the_same_logits_in_a_fresh_process(family: str, tied: bool, rows: Path, tmp_path: Path) -> None:
    vocabulary = len(build_tokenizer())
    base = save_tiny(tmp_path / "base", family, vocab_size=vocabulary, tie_word_embeddings=tied)
    step = llmlite.Lora(r=2, merge=not tied, **SHORT)
    made = recipe(base, rows, tmp_path / "out", step)
    planned = made.check().rows[-1]
    report = made.run()
    assert report.reload_difference == 0.0
    assert f"base.resize_token_embeddings({vocabulary + 2}, mean_resizing=False)" in report.loading
    assert report.rows[-1].parameters == planned["parameters"]
    weights = load_file(report.path / "adapter_model.safetensors")
    trained = {name: tensor for name, tensor in weights.items() if "lora_" not in name}
    assert {tuple(tensor.shape) for tensor in trained.values()} == {(2, 64)}
    assert len(trained) == (1 if tied else 2)  # one matrix, or embedding and head
    if tied:  # as docs/adapters.md has it
        names = {"Qwen/Qwen3-0.6B": base, "151_671": str(vocabulary + 2), "outputs/lora": report.path}
        found: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
        exec(snippet("docs/adapters.md", "resize_token_embeddings", names), found)
        ids_BT, (ours, _) = torch.tensor([[5, vocabulary, 6, vocabulary + 1]]), load_result(report.path)
        assert torch.equal(logits_of(found["model"].eval(), ids_BT), logits_of(ours, ids_BT))
        return
    command = [sys.executable, "-c", STRANGER, str(base), str(report.path), str(tmp_path / "found.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert (found["ids"] >= vocabulary).sum() == 2
    ours, _ = load_result(report.path)
    with torch.no_grad():
        expected = ours(input_ids=found["ids"]).logits
    assert torch.equal(found["logits"], expected)
    # merged: a whole model with the rows inside
    merged = AutoModelForCausalLM.from_pretrained(report.path / "merged", dtype=torch.float32)
    assert merged.get_input_embeddings().weight.shape[0] == vocabulary + 2
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=found["ids"]).logits, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)  # bfloat16


def test_a_padded_base_keeps_its_size_and_a_quantized_one_its_blocks(rows: Path, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "gemma3_text", vocab_size=len(build_tokenizer()) + 40, tie_word_embeddings=True)
    report = recipe(base, rows, tmp_path / "out", NF4, llmlite.Bottleneck(bottleneck_size=4, **SHORT)).run()
    assert report.reload_difference == 0.0
    assert "resize" not in report.loading
    config = json.loads((report.path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [len(build_tokenizer()), len(build_tokenizer()) + 1]}
    delta = next(tensor for name, tensor in load_file(report.path / "adapter_model.safetensors").items() if "trainable_tokens" in name)
    start = AutoModelForCausalLM.from_pretrained(report.path / "steps" / "01-quantize").get_input_embeddings().weight
    assert not torch.equal(delta, start[config["trainable_token_indices"]["embed_tokens"]].float())  # they were trained


def test_a_new_row_is_the_mean_of_its_pieces_in_embedding_and_head(tmp_path: Path) -> None:
    from llmlite.models.find import find
    from llmlite.models.load import load_model, load_tokenizer
    from llmlite.models.settings import Model

    base = save_tiny(tmp_path / "base", "llama", vocab_size=len(build_tokenizer()), tie_word_embeddings=False)
    settings = Model(name=str(base), add_tokens=TOKENS)
    source = find(settings)
    stock, model = AutoModelForCausalLM.from_pretrained(base), load_model(source, settings, torch.device("cpu"))
    before, after = AutoTokenizer.from_pretrained(base), load_tokenizer(source, settings)
    assert after.tokenize("a<call>b") == ["a", "<call>", "b"]
    assert after("a plus b")["input_ids"] == before("a plus b")["input_ids"]
    for module in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(stock, module)().weight, getattr(model, module)().weight
        assert torch.equal(new[: len(old)], old)
        for token in TOKENS:
            by_hand = torch.stack([old[index] for index in before(token)["input_ids"]]).mean(0)
            torch.testing.assert_close(new[after.convert_tokens_to_ids(token)], by_hand)


def test_a_token_that_the_tokenizer_wrote_in_nothing_starts_as_the_mean_of_all() -> None:
    model = build_tiny("llama", vocab_size=20)
    expected = model.get_input_embeddings().weight.detach().mean(0)
    fill_rows(model, {20: [], 21: [3]}, 22)
    torch.testing.assert_close(model.get_input_embeddings().weight[20], expected)


@pytest.mark.slow
def test_all_weights_learn_the_tokens_too_and_the_run_continues(rows: Path, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", vocab_size=len(build_tokenizer()), tie_word_embeddings=True)
    made = recipe(base, rows, tmp_path / "out", llmlite.Finetune(**SHORT))
    report = made.run()
    assert report.reload_difference == 0.0
    assert len(AutoTokenizer.from_pretrained(report.path)) == len(build_tokenizer()) + 2
    assert made.run().rows[-1].perplexity == report.rows[-1].perplexity


def test_what_cannot_be_done_with_added_tokens_is_said_before_weights_load(rows: Path, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", vocab_size=len(build_tokenizer()))

    def problem(*steps: Any, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            recipe(base, rows, tmp_path / "out", *steps, **options).check()
        return str(caught.value)

    assert "ia3 cannot train the rows of added tokens" in problem(llmlite.Ia3())
    assert "modules_to_save all of them" in problem(llmlite.Lora(modules_to_save=("embed_tokens",)))
    assert "'What' is a token of this tokenizer already" in problem(llmlite.Lora(), add_tokens=("What",))
    assert "'<a>' is named twice" in problem(llmlite.Lora(), add_tokens=("<a>", "<a>"))
    assert "prune.vocabulary in one recipe" in problem(llmlite.PruneVocabulary(), llmlite.Lora())
    base = save_tiny(tmp_path / "phi", "phi", vocab_size=len(build_tokenizer()))
    assert "head of phi has a bias" in problem(llmlite.Lora())
