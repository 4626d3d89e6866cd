"""The card, from a report: what its metadata say for each kind of result, and that nothing can break out of it."""

from __future__ import annotations

import ast
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmlite
from llmlite.errors import LoadError, OutputError
from llmlite.html.images import CURVE, OVERVIEW, card_images
from llmlite.hub.card import model_card, write_card
from llmlite.hub.lines import loading_lines, loading_snippet
from llmlite.hub.multi_adapter import Adapters
from llmlite.hub.push import push, what_is_sent
from llmlite.plan import made_before_adapter
from llmlite.quantization.error import error_report
from llmlite.report import SPEED_OF_STEPS, Report, Row


def report_of(
    folder: Path, steps: list[dict[str, Any]], base: dict[str, Any] | None = None, train: str = "builtin:python-docs", adapter: bool = False
) -> Report:
    """A finished run of two rows, without running anything."""
    (folder / ("adapter_config.json" if adapter else "config.json")).write_text("{}")
    rows = [Row("base", 1000, 2000, 10.0), Row(steps[-1]["step"], 500, 1000, 12.5, kl=0.25, top1_agreement=0.9)]
    base = {"name": "team/base", "hub_id": "team/base", "license": "mit"} if base is None else base
    recipe = {"model": {"name": "team/base"}, "data": {"train": train}, "steps": steps, "seed": 3}
    report = Report(folder, recipe, {"text": f"{train}, held-out part", "tokens": 7, "examples": 2}, {"device": "cpu"}, rows, base=base)
    report.save()
    return report


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.parametrize(
    ("steps", "adapter", "relation", "library"),
    [
        ([{"step": "quantize", "scheme": "nf4"}], False, "quantized", "transformers"),
        ([{"step": "prune.heads", "keep": 0.5}, {"step": "quantize", "scheme": "nf4"}], False, "finetune", "transformers"),
        ([{"step": "finetune", "learning_rate": 1e-4}], False, "finetune", "transformers"),
        ([{"step": "quantize"}, {"step": "lora", "r": 4}], True, "adapter", "peft"),
    ],
)
def test_the_relation_to_the_base_follows_from_the_steps(tmp_path: Path, steps: list[dict[str, Any]], adapter: bool, relation: str, library: str) -> None:
    report = report_of(tmp_path, steps, adapter=adapter)
    if steps[-1]["step"] == "quantize":
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}))
    data = metadata(model_card(report, tmp_path, "me/x"))
    assert (data["base_model"], data["base_model_relation"], data["library_name"], data["license"]) == ("team/base", relation, library, "mit")


def test_a_base_that_was_a_local_folder_is_never_named_as_base_model(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "lora"}], base={"name": "tiny"}, adapter=True)
    card = model_card(report, tmp_path, "me/x")
    assert "base_model" not in metadata(card)
    assert "`tiny` was a local folder" in card
    assert metadata(model_card(report, tmp_path, "me/x", base_model="team/tiny"))["base_model"] == "team/tiny"


def test_figures_and_changes_stand_in_the_table_and_missing_ones_are_named_as_not_measured(tmp_path: Path) -> None:
    card = model_card(report_of(tmp_path, [{"step": "finetune"}]), tmp_path, "me/x")
    assert "| perplexity | 10 | 12.5 | +25.0% |" in card
    assert "| parameters | 1,000 | 500 | -50.0% |" in card
    assert "| KL divergence from the base, nats a token |  | 0.2500 |  |" in card
    assert "decode, tokens a second" not in card
    assert "- speed\n- peak memory\n- anything on a GPU" in card


def test_a_collapse_stands_above_the_figures(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "finetune"}])
    assert "far from its base" not in model_card(report, tmp_path, "me/x")
    report.rows[-1] = dataclasses.replace(report.rows[-1], perplexity=3e33, kl=80.0)
    text = model_card(report, tmp_path, "me/x").partition("## The base against this")[0]
    assert "**This model is far from its base: perplexity 10 -\\> 3e+33" in text
    assert "KL to the base 80 nats a token (limit 1)" in text


def test_the_card_says_of_which_model_the_speed_is(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "finetune"}])
    assert SPEED_OF_STEPS not in model_card(report, tmp_path)
    report.rows[-1] = dataclasses.replace(report.rows[-1], decode_tokens_per_second=9.0)
    assert SPEED_OF_STEPS in model_card(report, tmp_path)
    assert report.table().caption == SPEED_OF_STEPS


def test_the_worst_layers_and_what_to_do_about_them_stand_under_how_it_was_made(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "quantize"}])
    report.rows[1].details.update(error_report({f"layers.{n}.up": 0.002 for n in range(9)} | {"layers.0.down": 0.25}))
    made = model_card(report, tmp_path, "me/x").partition("## How it was made")[2]
    assert "`quantize`: Relative output error of a layer on calibration text: 0.027 on average, largest in layers.0.down 0.25, layers.0.up 0.002, " in made
    assert r"skip: \[layers.0.down\] leaves it in 16 bit." in made
    assert "Relative output error" not in model_card(report_of(tmp_path, [{"step": "finetune"}]), tmp_path, "me/x")


def test_only_a_data_set_of_the_hub_is_named_as_one(tmp_path: Path) -> None:
    steps = [{"step": "finetune", "learning_rate": 1e-4}]
    assert metadata(model_card(report_of(tmp_path, steps, train="team/chats"), tmp_path))["datasets"] == ["team/chats"]
    for name in ("builtin:python-docs", "/srv/x/chat.jsonl", "rows/chat.jsonl"):
        assert "datasets" not in metadata(model_card(report_of(tmp_path, steps, train=name), tmp_path))


def test_names_with_quotes_cannot_leave_the_string_they_stand_in() -> None:
    evil = 'x"); import os  #'
    parsed = ast.parse(loading_snippet(evil, {"name": evil}, None, evil))
    assert [node.names[0].name for node in ast.walk(parsed) if isinstance(node, ast.Import)] == []
    literals = [node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant)]
    assert literals.count(evil) == 5  # the base, and place and revision of adapter and tokenizer


@pytest.mark.parametrize("adapters", [{}, {"../a": {}}, {'x"); import os #': {}}, {"a": {"kind": "lora"}}, ["a"]])
def test_a_list_of_adapters_that_no_export_wrote_is_refused(adapters: Any, tmp_path: Path) -> None:
    assert Adapters.read(tmp_path) is None
    (tmp_path / "adapters.json").write_text(json.dumps({"base": {}, "adapters": adapters, "environment": {}}))
    with pytest.raises(LoadError, match="is not what `llmlite export` writes"):
        Adapters.read(tmp_path)


def test_the_lines_that_a_fresh_process_runs_are_python_whatever_the_folders_and_adapters_are_called() -> None:
    evil = 'x"); import os  #\\ \n'
    parsed = ast.parse("\n".join([loading_lines(evil), loading_lines(evil, evil, "float32", 7, (evil, "b"))]))
    assert [name.name for node in ast.walk(parsed) if isinstance(node, ast.Import) for name in node.names] == []
    literals = [node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant)]
    assert literals.count(evil) == 6  # the model; the base, the place of two adapters, name and folder of one of them


def test_secrets_and_folders_planted_all_over_a_report_are_in_nothing_that_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, key = "hf_" + "plantedplantedplanted", "planted-key-of-agatha"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WANDB_API_KEY", key)
    planted = f"{token} {key} /home/agatha/x"
    report = report_of(tmp_path, [{"step": "finetune", "note": planted, "teacher": "/home/agatha/teacher"}], train="/home/agatha/rows.jsonl")
    report.environment |= {"cpu": planted, "cwd": "/home/agatha"}
    report.evaluation["text"] = f"/home/agatha/rows.jsonl, held-out part {planted}"
    report.rows[1].details.update(log=[planted], nested={"folder": "/home/agatha/run"})
    report.rows[1].details["train_loss"] = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    report.rows[1].details["energy"] = {"joules": 1.0, "source": planted, "kind": "measured"}
    report.rows[1] = dataclasses.replace(report.rows[1], name=planted)  # a step of somebody's own may be called anything
    answers = [{"prompt": "a private question", "answer": "a private answer"}]
    model = {"bytes_on_disk": 1, "perplexity": 9.0, "kl": None, "top1_agreement": None, "latency": [], "tasks": [], "joules_per_1000_tokens": None}
    model |= {"answers": answers, "energy": {"source": planted}}
    about = {"quality_on": f"Quality on rows of /home/agatha/rows.jsonl {planted}", "cpu": planted}
    (tmp_path / "evaluation.json").write_text(json.dumps({"about": about, "models": {"base": model, "this": model}}))
    report.loading = 'model = from_pretrained("/home/agatha/out")'
    report.save()
    assert "agatha" in (tmp_path / "report.json").read_text()
    sent = what_is_sent(tmp_path, report, "me/x")
    assert {"README.md", "report.json", "report.html", "recipe.yaml", "evaluation.json", OVERVIEW, CURVE} <= set(sent)
    for name, content in sent.items():
        text = content.decode(errors="replace") if isinstance(content, bytes) else content.read_text()
        assert not {secret for secret in (token, key, "agatha", "a private") if secret in text}, name
    local = write_card(report).read_text()
    assert not {secret for secret in (token, key, "agatha") if secret in local}


def chunks_of(png: bytes) -> list[str]:
    """Names of the chunks of a PNG file, in order."""
    found, at = [], 8
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at : at + 8])
        found.append(name.decode())
        at += 12 + size
    return found


def test_the_card_s_images_are_small_pictures_without_metadata_and_the_same_every_time(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "finetune"}])
    report.rows[1].details["train_loss"] = [{"step": step, "loss": 5 / step} for step in range(1, 9)]
    file = write_card(report)
    images = card_images(report)
    assert set(images) == {OVERVIEW, CURVE}
    for name, image in images.items():
        assert (tmp_path / name).read_bytes() == image == card_images(report)[name]
        assert image.startswith(b"\x89PNG")
        assert len(image) < 40_000
        assert set(chunks_of(image)) <= {"IHDR", "pHYs", "IDAT", "IEND"}
        assert f"]({name})" in file.read_text()
    assert "perplexity 12.5](base_against_this.png)" in file.read_text()
    assert {name for name in what_is_sent(tmp_path, report, "me/x") if name.endswith(".png")} == set(images)


def test_a_figure_that_is_no_number_is_drawn_as_none_and_an_untrained_result_has_no_curve(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "quantize"}])
    report.rows[1] = dataclasses.replace(report.rows[1], perplexity=float("inf"), name="$x^{")  # no formula for matplotlib
    assert set(card_images(report)) == {OVERVIEW}
    assert card_images(Report(tmp_path, report.recipe, {}, {}, report.rows[:1])) == {}


def test_a_fence_in_the_recipe_does_not_end_the_card_s_fence(tmp_path: Path) -> None:
    card = model_card(report_of(tmp_path, [{"step": "finetune", "note": "```\n# not a heading\n```"}]), tmp_path)
    fence = card.split("The whole recipe:\n\n")[1].split("yaml")[0]
    assert len(fence) > 3
    assert card.count(f"\n{fence}\n") == 1


def test_a_card_that_a_person_took_over_is_kept(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "finetune"}])
    file = write_card(report)
    first = file.read_text()
    write_card(report)
    assert file.read_text() == first
    assert what_is_sent(tmp_path, report, "me/x")["README.md"] != first.encode()  # written anew, with the repository's name
    file.write_text("# My own words\n")
    write_card(report)
    assert file.read_text() == "# My own words\n"
    assert what_is_sent(tmp_path, report, "me/x")["README.md"] == file


def test_an_adapter_on_a_model_that_nobody_else_has_is_refused_without_its_base(tmp_path: Path) -> None:
    report = report_of(
        tmp_path, [{"step": "prune.heads"}, {"step": "lora"}], base={"name": "b", "hub_id": "team/base", "made_by": ["prune.heads"]}, adapter=True
    )
    with pytest.raises(OutputError, match=r"made itself \(prune.heads\).*(?s:.*)--base_model OWNER/NAME"):
        push(report, "me/x")


def test_the_base_s_folder_in_a_config_becomes_its_name_or_its_hub_id(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "lora"}], base={"name": "tiny"}, adapter=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/srv/agatha/tiny"}))

    def named(base_model: str | None) -> str:
        content = what_is_sent(tmp_path, report, "me/x", base_model)["adapter_config.json"]
        assert isinstance(content, bytes)
        return str(json.loads(content)["base_model_name_or_path"])

    assert named(None) == "tiny"
    assert named("team/tiny") == "team/tiny"


def test_the_card_has_what_was_evaluated_and_states_co2_only_with_a_stated_grid(tmp_path: Path) -> None:
    report = report_of(tmp_path, [{"step": "quantize", "scheme": "nf4"}])
    assert "- energy" in model_card(report, tmp_path, "me/x")
    report.rows[-1].details["energy"] = {"joules": 3.6e5, "source": "RAPL", "kind": "measured"}
    card = model_card(report, tmp_path, "me/x")
    assert "| energy of all steps, joules (measured, RAPL) | | 3.6e+05 | |" in card.replace("  ", " ")
    assert "- energy" not in card
    assert "co2_eq_emissions" not in metadata(card)
    report.recipe["grid_grams_per_kwh"] = 400.0
    assert metadata(model_card(report, tmp_path, "me/x"))["co2_eq_emissions"]["emissions"] == pytest.approx(40)
    latency = {"batch": 1, "ttft_p50": 0.1, "ttft_p95": 0.2, "tpot_p50": 0.01, "tpot_p95": 0.02}
    latency |= {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 5.0, "peak_memory_bytes": 10**9}
    latency |= {"repeats": 5, "prompt_tokens": 256, "new_tokens": 16}
    task = {"task": "arc", "metric": "acc", "value": 0.5, "standard_error": 0.05, "flips": 0.125}
    figures = {"bytes_on_disk": 10, "perplexity": 9.0, "kl": 0.1, "top1_agreement": 0.9, "latency": [latency], "tasks": [task]}
    energy = {"joules_per_1000_tokens": None, "energy": {}, "grid_grams_per_kwh": None}
    models = {"base": {**figures, **energy}, "this": {**figures, **energy}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"about": {"quality_on": "Quality on 7 tokens."}, "models": models}))
    card = model_card(report, tmp_path, "me/x")
    assert "| arc (acc) | 0.500 ± 0.050 | 0.500 ± 0.050 |" in card
    assert "100 / 200" in card
    assert "- benchmark tasks" not in card


def test_only_codes_that_anybody_gets_while_loading_may_be_left_to_the_base() -> None:
    def made_by(*steps: Any) -> list[str]:
        return made_before_adapter(llmlite.Recipe(steps=steps))

    assert made_by(llmlite.Quantize(calibrate=False), llmlite.Lora()) == []
    assert made_by(llmlite.Quantize(scheme="int8"), llmlite.Lora()) == []
    assert made_by(llmlite.Quantize(scheme="nf4"), llmlite.Lora()) == ["quantize with calibrate: true"]
    assert made_by(llmlite.PruneFfn(keep=0.5), llmlite.Quantize(calibrate=False), llmlite.Lora()) == ["prune.ffn"]
    taught = llmlite.DistillWhiteBox()
    assert made_by(llmlite.Quantize(calibrate=False), llmlite.Bottleneck(), taught) == made_by(llmlite.Ia3(), taught) == made_by(llmlite.Lora(), taught) == []
    assert made_by(llmlite.PruneFfn(keep=0.5), llmlite.Prefix(), taught) == ["prune.ffn"]
    assert made_by(llmlite.PruneFfn(keep=0.5), llmlite.DistillWhiteBox(adapter=llmlite.Lora()), taught) == ["prune.ffn"]
    assert made_by(llmlite.Lora(), llmlite.Merge(), llmlite.Lora()) == ["lora", "merge"]
