"""Adapters of several runs in one folder: stock peft loads them side by side and switches by name, in a fresh process, on the Hub too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmlite
from llmlite.cli import main
from llmlite.errors import ConfigError, OutputError, RunError
from llmlite.hub.push import push
from llmlite.kept import load_result
from llmlite.models.safety import make_safe
from tests.conftest import logits_of, save_tiny, token_ids
from tests.hub.conftest import STRANGERS_LINES, loopback_hub
from tests.hub.fake_hub import FakeHub
from tests.snippets import snippet

SMALL: dict[str, Any] = {"max_length": 64, "evaluation_rows": 4, "max_steps": 1}
BASE = "team/tiny-base"

# what a stranger would run, with the names of the card
STRANGER = (
    STRANGERS_LINES
    + """ids, found = load_file(sys.argv[1])["ids"], {{}}
for name in ("sql", "chat", "sql"):
    model.set_adapter(name)
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids).logits.float()
save_file(found, sys.argv[2])
assert not any(name.startswith("llmlite") for name in sys.modules)
"""
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    torch.set_num_threads(1)
    with loopback_hub(tmp_path_factory.mktemp("cache")) as hub:
        push(save_tiny(tmp_path_factory.mktemp("base") / "tiny-base"), BASE)
        yield hub


@pytest.fixture(scope="module")
def runs(hub: FakeHub, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, one trained after the other, each on the 4-bit form of the same base."""
    place = tmp_path_factory.mktemp("home-of-agatha")
    for seed, name in enumerate(("sql", "chat")):
        options = {"model": BASE, "data": str(pairs_file), "seed": seed, "r": 2 + seed, "learning_rate": 0.05, **SMALL, "max_steps": 4}
        llmlite.LoraInt4(output_dir=str(place / name), **options).run()
    return {name: place / name for name in ("sql", "chat")}


def test_two_runs_become_one_folder_that_stock_peft_loads_and_switches_on_the_hub(
    runs: dict[str, Path], hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    main(["export", *map(str, runs.values()), "--output_dir", str(out)])
    said = capsys.readouterr().out
    assert 'model.load_adapter("' in said
    assert 'model.set_adapter("chat")' in said
    assert {path.name for path in out.iterdir()} >= {"sql", "chat", "adapters.json", "README.md", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in (out / "sql").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    main(["push", str(out), "me/both", "--verify"])
    assert "largest difference of a logit is 0.0e+00" in capsys.readouterr().out
    files = hub.files("me/both")
    assert {"sql/adapter_model.safetensors", "chat/adapter_model.safetensors", "sql/adapter_config.json"} <= set(files)
    card = files["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (BASE, "adapter", "peft")
    assert 'model.load_adapter("me/both", adapter_name="chat", subfolder="chat")' in card
    report = llmlite.Report.read(runs["chat"])
    assert f"| chat | lora | {report.rows[2].parameters - report.rows[1].parameters:,} |" in card
    assert f"| {report.rows[1].perplexity:.4g} | {report.rows[2].perplexity:.4g} |" in card
    assert not any(b"home-of-agatha" in content for content in files.values())

    # as docs/adapters.md has it
    base = AutoModelForCausalLM.from_pretrained(runs["sql"] / "steps" / "01-quantize")
    make_safe(base)
    names: dict[str, Any] = {"PeftModel": PeftModel, "base": base}
    exec(snippet("docs/adapters.md", 'set_adapter("chat")', {"outputs/both": out}), names)
    torch.testing.assert_close(logits_of(names["model"].eval()), logits_of(load_result(runs["chat"])[0]), atol=1e-5, rtol=0)

    save_file({"ids": token_ids()}, tmp_path / "in.safetensors")
    lines = card.split("```python\n")[1].split("\n```")[0]
    command = [sys.executable, "-c", STRANGER.format(snippet=lines), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    for name, folder in runs.items():
        model, _ = load_result(folder)
        with torch.no_grad():
            torch.testing.assert_close(found[name], model(input_ids=token_ids()).logits.float(), atol=1e-5, rtol=0)
    assert not torch.allclose(found["sql"], found["chat"], atol=1e-3)


def test_what_cannot_lie_side_by_side_is_refused_with_every_reason(runs: dict[str, Path], hub: FakeHub, tmp_path: Path) -> None:
    other = shutil.copytree(runs["sql"], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    manifest = other / "steps" / "01-quantize" / "manifest.json"
    sums = json.loads(manifest.read_text())
    sums["model.safetensors"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(sums))
    with pytest.raises(ConfigError) as refused:
        llmlite.export([runs["sql"], other], tmp_path / "out")
    assert "'other' was trained on another base than 'sql'" in str(refused.value)
    assert "'other' is IA3 and 'sql' LORA" in str(refused.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"'sql' is the name of two adapters(?s:.*)--names"):
        llmlite.export([runs["sql"], runs["sql"]], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'v1.0' is no name for an adapter"):
        llmlite.export(list(runs.values()), tmp_path / "out", ["v1.0", "b"])
    with pytest.raises(
        ConfigError, match=r"'train' cannot be the name of an adapter: torch's(?s:.*)'lora' cannot be the name of an adapter: peft takes it for"
    ):
        llmlite.export(list(runs.values()), tmp_path / "out", ["train", "lora"])
    with pytest.raises(ConfigError, match="two or more"):
        llmlite.export([runs["sql"]], tmp_path / "out")
    with pytest.raises(OutputError, match="holds no finished run whose result is an adapter"):
        llmlite.export([runs["sql"], runs["sql"] / "steps" / "01-quantize"], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        llmlite.export(list(runs.values()), tmp_path / "full")
    for name, text in {"adapters.json": "{}", "manifest.json": '{"adapters.json": {}}'}.items():  # an earlier export, and something else in it
        (tmp_path / "full" / name).write_text(text)
    with pytest.raises(OutputError, match=r"holds something else \(mine.txt\)"):
        llmlite.export(list(runs.values()), tmp_path / "full")


@pytest.mark.slow
def test_other_logits_in_the_fresh_process_leave_no_folder_behind(runs: dict[str, Path], hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlite.multi_adapter.load_result", lambda folder: load_result(runs["chat"] if folder == runs["sql"] else runs["sql"]))
    with pytest.raises(RunError, match="is not the model in memory"):
        llmlite.export(list(runs.values()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
