"""A run that starts from the Hub and ends on it, and what a stranger with stock libraries gets from there; and what nobody may find there."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.errors import ConfigError, HubError, OutputError, PushFailed
from llmlite.hub.push import push
from llmlite.kept import load_result
from llmlite.report import Report
from tests.conftest import build_tokenizer, save_tiny, token_ids
from tests.hub.conftest import STRANGERS_LINES, loopback_hub
from tests.hub.fake_hub import TOKEN, FakeHub

PLANTED = {"WANDB_API_KEY": "planted-wandb-key-0123456789", "MY_PASSWORD": "planted-correct-horse"}
BASE = "team/tiny-base"

# what a stranger would run; no llmlite in sight
PULL = (
    STRANGERS_LINES
    + """with torch.no_grad():
    logits = model.eval()(input_ids=load_file(sys.argv[1])["input_ids"]).logits.float()
save_file({{"logits": logits}}, sys.argv[2])
assert not any(name.startswith("llmlite") for name in sys.modules)
"""
)


def pulled_logits(snippet: str, folder: Path, ids_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Run the lines in a fresh process with an empty cache and return the logits on these tokens, else the standard ones."""
    from safetensors.torch import save_file

    save_file({"input_ids": token_ids() if ids_BT is None else ids_BT}, folder / "in.safetensors")
    command = [sys.executable, "-c", PULL.format(snippet=snippet), str(folder / "in.safetensors"), str(folder / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")["logits"]


def snippet_of(card: str) -> str:
    return card.split("```python\n")[1].split("\n```")[0]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    torch.set_num_threads(1)
    with loopback_hub(tmp_path_factory.mktemp("cache")) as hub:
        for name, value in PLANTED.items():
            os.environ[name] = value
        base = save_tiny(tmp_path_factory.mktemp("base") / "tiny-base")
        (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# A base\n")
        push(base, BASE)
        yield hub
        for name in PLANTED:
            os.environ.pop(name)


@pytest.fixture(scope="module")
def messages() -> list[str]:
    return []


@pytest.fixture(scope="module")
def run(hub: FakeHub, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory, messages: list[str]) -> Report:
    """A whole run of lora_int4 from the Hub to the Hub; its data lies in a folder that names a user, its answer at the end holds a token."""
    home = tmp_path_factory.mktemp("home-of-agatha")
    data = home / "private rows" / "pairs.jsonl"
    data.parent.mkdir()
    # the first rows are what the report quotes: one of them tells a token and a folder
    rows = [json.dumps({"prompt": f"What is {n} and {TOKEN} in {home}?", "completion": f"{n} plus one."}) + "\n" for n in range(60)]
    data.write_text("".join(rows))
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    logging.getLogger("llmlite").setLevel(logging.INFO)
    options = {"max_length": 128, "evaluation_rows": 4, "r": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "max_steps": 1}
    recipe = llmlite.LoraInt4(model=BASE, data=str(data), output_dir=str(home / "out"), push_to_hub=True, hub_model_id="me/tiny-lora", **options)
    report = recipe.run()
    logging.getLogger().removeHandler(handler)
    return report


def test_a_run_ends_on_the_hub_with_adapter_tokenizer_card_recipe_and_report(run: Report, hub: FakeHub) -> None:
    files = hub.files("me/tiny-lora")
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_against_this.png",
        "chat_template.jinja",
        "recipe.yaml",
        "report.html",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert hub.repos["me/tiny-lora"].private
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE


def test_the_right_to_push_is_asked_for_before_anything_is_computed(run: Report, hub: FakeHub, pairs_file: Path, tmp_path: Path) -> None:
    options = {"model": BASE, "data": str(pairs_file), "max_length": 64, "push_to_hub": True}
    with pytest.raises(HubError, match="cannot write to 'google'"):
        llmlite.LoraInt4(output_dir=str(tmp_path / "out"), hub_model_id="google/x", **options).run()
    hub.add("me/open", private=False)
    with pytest.raises(HubError, match="exists and is public; a private one was asked for"):
        llmlite.LoraInt4(output_dir=str(tmp_path / "out"), hub_model_id="me/open", **options).run()
    assert not (tmp_path / "out").exists()


def test_the_card_s_metadata_name_the_base_its_licence_and_the_library(run: Report, hub: FakeHub) -> None:
    card = hub.files("me/tiny-lora")["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0"
    assert {"llmlite", "lora", "4-bit", "nf4"} <= set(data["tags"])
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == round(run.rows[-1].perplexity, 4)


def test_the_card_shows_the_report_s_figures_the_recipe_and_what_was_not_measured(run: Report, hub: FakeHub) -> None:
    card = hub.files("me/tiny-lora")["README.md"].decode()
    assert f"| perplexity | {run.rows[0].perplexity:.4g} | {run.rows[-1].perplexity:.4g} |" in card
    assert f"| {run.rows[0].parameters:,} | {run.rows[-1].parameters:,} |" in card
    assert 'bnb_4bit_quant_type="nf4"' in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
    assert recipe == yaml.safe_load(hub.files("me/tiny-lora")["recipe.yaml"])
    assert recipe["model"]["name"] == BASE
    assert recipe["data"]["train"] == "pairs.jsonl"
    assert "- benchmark tasks" in card


def test_the_lines_on_the_card_load_the_adapter_by_stock_libraries_with_the_same_logits(run: Report, hub: FakeHub, tmp_path: Path) -> None:
    from peft import PeftModel

    from llmlite.models.safety import make_safe

    base = AutoModelForCausalLM.from_pretrained(run.path / "steps" / "01-quantize", dtype="auto")
    make_safe(base)
    model = PeftModel.from_pretrained(base, run.path).eval()
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits.float()
    got = pulled_logits(snippet_of(hub.files("me/tiny-lora")["README.md"].decode()), tmp_path)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_full_model_comes_back_from_the_hub_and_verify_says_so(hub: FakeHub, full_model: Path) -> None:
    assert push(full_model, "me/tiny-full", verify=True).difference == 0.0


def test_a_4_bit_model_comes_back_from_the_hub_still_in_4_bit(run: Report, hub: FakeHub) -> None:
    pushed = push(run.path / "steps" / "01-quantize", "me/tiny-nf4", base_model=BASE, verify=True)
    assert pushed.difference == 0.0
    files = hub.files("me/tiny-nf4")
    assert json.loads(files["config.json"])["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert not {"manifest.json", "row.json"} & set(files)
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert (card["base_model"], card["base_model_relation"]) == (BASE, "quantized")


def test_a_bottleneck_adapter_comes_back_by_the_one_line_on_its_card(run: Report, hub: FakeHub, pairs_file: Path, tmp_path: Path) -> None:
    options = {"model": BASE, "data": str(pairs_file), "max_length": 64, "evaluation_rows": 4, "max_steps": 1}
    report = llmlite.recipes.BottleneckAdapter(output_dir=str(tmp_path / "out"), bottleneck_size=8, **options).run()
    assert push(report.path, "me/tiny-bottleneck", verify=True).difference == 0.0
    card = hub.files("me/tiny-bottleneck")["README.md"].decode()
    assert 'model = load_adapter(base, "me/tiny-bottleneck")' in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model_relation"] == "adapter"


@pytest.mark.slow
def test_an_adapter_on_calibrated_codes_goes_up_with_the_repository_that_holds_them(run: Report, hub: FakeHub, pairs_file: Path, tmp_path: Path) -> None:
    steps = [{"step": "quantize", "scheme": "nf4"}, {"step": "correct", "r": 2}]
    options = {"model": BASE, "data": str(pairs_file), "calibration": str(pairs_file), "calibration_sequences": 4, "max_length": 64, "evaluation_rows": 4}
    recipe = llmlite.Recipe.from_options(("test", {**options, "steps": steps, "output_dir": str(tmp_path / "out")}))
    report = recipe.run()
    with pytest.raises(OutputError, match=r"made itself \(quantize with calibrate: true\).*(?s:.*)--base_model OWNER/NAME"):
        push(report.path, "me/tiny-corrected")  # the base rounded while loading has other codes
    with pytest.raises(ConfigError, match="this run makes itself"):
        dataclasses.replace(recipe, push_to_hub=True, hub_model_id="me/tiny-corrected").check()
    push(report.path / "steps" / "01-quantize", "me/tiny-calibrated", base_model=BASE)
    push(report.path, "me/tiny-corrected", base_model="me/tiny-calibrated")
    ours, _ = load_result(report.path)
    with torch.no_grad():
        expected = ours(input_ids=token_ids()).logits.float()
    got = pulled_logits(snippet_of(hub.files("me/tiny-corrected")["README.md"].decode()), tmp_path)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_added_tokens_come_back_on_the_stock_base_in_4_bit_by_the_lines_on_the_card(run: Report, hub: FakeHub, tmp_path: Path) -> None:
    rows = tmp_path / "calls.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f"<call>{n}</call>"}) + "\n" for n in range(60)))
    base = save_tiny(tmp_path / "tight", vocab_size=len(build_tokenizer()))
    push(base, "team/tight")
    options = {"model": "team/tight", "add_tokens": ["<call>", "</call>"], "data": str(rows), "max_length": 64, "evaluation_rows": 4, "max_steps": 2}
    report = llmlite.LoraInt4(output_dir=str(tmp_path / "out"), r=2, **options).run()
    push(report.path, "me/tiny-calls")
    card = hub.files("me/tiny-calls")["README.md"].decode()
    assert r"It adds tokens (\<call\>, \</call\>)" in card
    assert f"base.resize_token_embeddings({len(build_tokenizer()) + 2}, mean_resizing=False)" in card
    ours, _ = load_result(report.path)
    ids = torch.tensor([[5, len(build_tokenizer()), 7, len(build_tokenizer()) + 1]])
    with torch.no_grad():
        expected = ours(input_ids=ids).logits.float()
    torch.testing.assert_close(pulled_logits(snippet_of(card), tmp_path, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("difference", ["0.5", "NaN"])
def test_verify_does_not_accept_other_logits(difference: str, hub: FakeHub, full_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout=f'{{"difference": {difference}, "scale": 3.0}}\n', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(PushFailed, match=r"gives other logits.*(?s:.*)llmlite push"):
        push(full_model, "me/tiny-full", verify=True)


def test_no_token_key_folder_or_user_reaches_the_hub_the_card_or_the_log(run: Report, hub: FakeHub, messages: list[str]) -> None:
    sent = b"\n".join(hub.bodies) + b"\n".join(data for repo in hub.repos for data in hub.files(repo).values())
    for secret in (TOKEN, *PLANTED.values(), "home-of-agatha", "private rows"):
        assert secret.encode() not in sent, secret
    told = "\n".join(messages)
    assert "uploaded to" in told
    assert all("sample" not in row["details"] for row in json.loads(hub.files("me/tiny-lora")["report.json"])["rows"])  # rows of a private file
    assert all("sample" in row.details for row in run.rows)
    for secret in (TOKEN, *PLANTED.values()):
        assert secret not in told
    for file in sorted(path for path in run.path.rglob("*") if path.is_file()):
        written = file.read_bytes()  # images, caches of the evaluation, weights, manifests, what each step left
        assert not [secret for secret in PLANTED.values() if secret.encode() in written], file
        # the rows hold a token themselves, and a report kept at home may quote them
        assert TOKEN.encode() not in written or file.name in {"row.json", "report.json", "report.html"}, file
    card = (run.path / "README.md").read_text()
    for secret in (TOKEN, *PLANTED.values(), "home-of-agatha"):
        assert secret not in card


def test_a_secret_in_a_file_of_the_result_stops_the_push(hub: FakeHub, full_model: Path, tmp_path: Path) -> None:
    import shutil

    for name, text in {"generation_config.json": json.dumps({"note": PLANTED["MY_PASSWORD"]}), "chat_template.jinja": f"{{# {TOKEN} #}}"}.items():
        folder = tmp_path / name.partition(".")[0]
        shutil.copytree(full_model, folder)
        (folder / name).write_text(text)
        with pytest.raises(OutputError, match=rf"{name} gives away a token or key") as refused:
            push(folder, "me/leaky")
        assert TOKEN not in str(refused.value)
    assert "me/leaky" not in hub.repos


def test_files_that_are_no_part_of_the_result_stay_here(hub: FakeHub, full_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(full_model, tmp_path / "model")
    for name in (".env", "notes.txt", "training_args.bin", "optimizer.pt", "steps/01-x/model.safetensors", "01-x.work/y.json", ".lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    push(folder, "me/tidy")
    assert set(hub.files("me/tidy")) == {*(p.name for p in full_model.iterdir()), "README.md"}


def test_the_same_recipe_again_pushes_what_failed_to_be_pushed(run: Report, hub: FakeHub) -> None:
    recipe = llmlite.Recipe.from_file(run.path / "recipe.yaml", output_dir=str(run.path), push_to_hub=True, hub_model_id="me/second")
    hub.fail("POST", "/me/second/commit/", 403, message="no")
    with pytest.raises(PushFailed, match=r"To continue:\n  llmlite push .* me/second"):
        recipe.run()
    assert hub.files("me/second") == {}
    recipe.run()
    assert "adapter_model.safetensors" in hub.files("me/second")
