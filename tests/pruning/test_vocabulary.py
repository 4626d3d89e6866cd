"""`prune.vocabulary` by the public door: the same logits on kept tokens, honest figures, and steps behind it that read by the new tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmlite
from llmlite.context import Run
from llmlite.data.settings import Data
from llmlite.distillation.teacher import TeacherModel
from llmlite.errors import ConfigError
from llmlite.evaluation.quality import measure_quality, reference_of
from llmlite.models.size import size_of_config, size_of_model
from llmlite.models.view import ModelView
from llmlite.models.vocabulary import narrow_model, narrowed_config
from llmlite.report import Report
from tests.conftest import ALL_FAMILIES, build_tiny, logits_of, require_stock_reload, token_ids

pytestmark = pytest.mark.usefixtures("own_cache")

KEPT = [0, 1, 2, *range(3, 96, 2)]


def test_kept_tokens_have_the_logits_they_had_in_every_family_and_stock_code_reloads_them(tmp_path: Path) -> None:
    models: dict[str, Any] = {}
    for name in ALL_FAMILIES:
        dense = build_tiny(name)
        dense.generation_config.eos_token_id = [2, 5]
        small = models[name] = narrow_model(dense, KEPT)
        new_ids = token_ids(vocab_size=len(KEPT))
        old_ids = torch.tensor(KEPT)[new_ids]
        torch.testing.assert_close(logits_of(small, new_ids), logits_of(dense, old_ids)[..., KEPT], rtol=1e-5, atol=1e-5)
        assert small.generation_config.eos_token_id == [2, 4]
        assert ModelView(small).tied == ModelView(dense).tied
        assert size_of_model(small) == size_of_config(narrowed_config(dense.config, KEPT))
        assert size_of_model(small).decoder == size_of_model(dense).decoder
        small.generation_config.eos_token_id = 2
    with pytest.raises(ValueError, match="must stay"):
        narrow_model(build_tiny("llama"), KEPT[3:])
    for model in models.values():  # the standard tokens must be in the vocabulary
        model.resize_token_embeddings(96, mean_resizing=False)
    require_stock_reload(models, tmp_path)


def test_a_base_token_in_pieces_counts_once_and_kl_is_over_the_tokens_that_stay() -> None:
    model = build_tiny("llama")
    ids = token_ids(2, 12)
    reference, base = reference_of(model, [{"input_ids": ids, "labels": ids}])
    kept = torch.tensor(sorted({0, 1, 2, *ids.flatten().tolist()}))
    new = torch.searchsorted(kept, ids)
    small = narrow_model(model, kept.tolist())
    starts = torch.ones_like(new)
    same = measure_quality(small, [{"input_ids": new, "labels": new, "starts": starts}], reference.over(kept))
    assert same.kl == pytest.approx(0, abs=1e-5)
    assert (same.top1_agreement, same.tokens) == (1.0, base.tokens)
    assert same.perplexity < base.perplexity  # fewer tokens to spread over
    # now two of the tokens are pieces of the one before: the slow, obvious sums
    starts[:, 4:6] = 0
    labels = new.clone()
    labels[0, 8:] = -100
    starts[0, 8:] = 0
    logp = logits_of(small, new).log_softmax(-1)
    base_logp = logits_of(model, ids)[..., kept].log_softmax(-1)
    nll, kl, tokens, rows = 0.0, 0.0, 0, []
    for row in range(2):
        for place in range(1, 12):
            if labels[row, place] == -100:
                continue
            nll -= float(logp[row, place - 1, new[row, place]])
            if starts[row, place]:
                tokens += 1
                rows.append(row * 11 + place - 1)
                kl += float((base_logp[row, place - 1].exp() * (base_logp[row, place - 1] - logp[row, place - 1])).sum())
    chosen = type(reference)(reference.hidden_ND[rows], reference.head_VD, None, reference.transform)
    found = measure_quality(small, [{"input_ids": new, "labels": labels, "starts": starts}], chosen.over(kept))
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(float(torch.tensor(nll / tokens).exp()), rel=1e-4)
    assert found.kl == pytest.approx(kl / tokens, abs=1e-5)


# the whole way ------------------------------------------------------------------------------------------------------------------------

_STOCK = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
written = model.generate(**ids, max_new_tokens=4, do_sample=False)
assert "llmlite" not in sys.modules
print(json.dumps([len(tokenizer), model.config.vocab_size, tokenizer.decode(ids["input_ids"][0]), model.generation_config.eos_token_id, written.shape[1]]))
"""


@pytest.fixture(scope="module")
def finished(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, llmlite.Recipe, Report]:
    """A run that takes tokens away, prunes by calibration on text of the base and trains towards the base: all of it reads by the new tokenizer."""
    folder = tmp_path_factory.mktemp("vocabulary")
    steps = (
        llmlite.PruneVocabulary(multiple_of=1),
        llmlite.PruneFfn(keep=0.5, multiple_of=16),
        llmlite.DistillWhiteBox(max_steps=2, per_device_train_batch_size=2),
    )
    data = Data(train=str(pairs_file), max_length=48, calibration_sequences=8, evaluation_rows=6)
    recipe = llmlite.Recipe(model=str(model_folder), data=data, steps=steps, output_dir=str(folder / "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLITE_CACHE", str(folder / "cache"))
        return folder / "out", recipe, recipe.run()


def test_the_plan_is_what_comes_out_and_stock_code_loads_model_tokenizer_and_template(finished: tuple[Path, llmlite.Recipe, Report]) -> None:
    out, recipe, report = finished
    planned = [row["parameters"] for row in recipe.check().rows]
    assert planned == [row.parameters for row in report.rows]
    details = report.rows[1].details
    assert details["tokens_before"] == 320 > details["tokens_kept"]
    assert details["length_growth"]["held-out text"] >= 1
    assert details["length_growth"]["builtin:python-docs-prose"] > 1
    done = subprocess.run([sys.executable, "-c", _STOCK, str(out), "Was ist ½?"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens, vocabulary, text, end, _ = json.loads(done.stdout)
    assert tokens == vocabulary == details["tokens_kept"]
    assert text == "<|im_start|>user\nWas ist ½?<|im_end|>\n<|im_start|>assistant\n"
    assert AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(end) == "<|im_end|>"


def test_kept_text_is_read_as_before_by_the_saved_pair(finished: tuple[Path, llmlite.Recipe, Report], model_folder: Path) -> None:
    folder = finished[0] / "steps/01-prune.vocabulary"
    text = "<|im_start|>user\nWhat is 3 plus 4?<|im_end|>\n<|im_start|>assistant\n"
    ids, logits = [], []
    for place in (model_folder, folder):
        ids.append(AutoTokenizer.from_pretrained(place)(text, return_tensors="pt")["input_ids"])
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(place)(input_ids=ids[-1]).logits)
    kept = json.loads((folder / "vocabulary.json").read_text())["kept"]
    assert [kept[index] for index in ids[1][0]] == ids[0][0].tolist()
    torch.testing.assert_close(logits[1], logits[0][..., kept], rtol=1e-4, atol=1e-4)


def test_the_tokens_that_figures_count_are_the_bases(finished: tuple[Path, llmlite.Recipe, Report]) -> None:
    report = finished[2]
    base, narrowed = report.rows[:2]
    assert narrowed.kl is not None
    # the held-out rows use hardly a token that training does not: what is left of the difference is the smaller softmax
    assert base.perplexity * 0.5 < narrowed.perplexity < base.perplexity * 1.1
    assert narrowed.kl < 0.01


def test_a_run_that_goes_on_behind_the_step_reads_by_the_new_tokenizer(finished: tuple[Path, llmlite.Recipe, Report], tmp_path: Path) -> None:
    import shutil

    out, recipe, report = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    for name in ("02-prune.ffn", "03-distill.whitebox"):
        shutil.rmtree(copy / "steps" / name)
    (copy / "report.json").unlink()
    again = recipe.run(copy)
    assert [row.parameters for row in again.rows] == [row.parameters for row in report.rows]
    assert [row.perplexity for row in again.rows] == pytest.approx([row.perplexity for row in report.rows], rel=1e-4)


@pytest.fixture
def narrowing(model_folder: Path, pairs_file: Path, own_cache: None) -> Callable[..., llmlite.Recipe]:
    """A recipe that trains behind a smaller vocabulary towards a teacher, with these options."""
    data = Data(train=str(pairs_file), max_length=48, evaluation_rows=6)
    return lambda **options: llmlite.Recipe(
        model=str(model_folder), data=data, steps=(llmlite.PruneVocabulary(multiple_of=1), llmlite.DistillWhiteBox(max_steps=1, **options))
    )


def test_the_base_that_teaches_has_lost_the_same_tokens(narrowing: Callable[..., llmlite.Recipe], tmp_path: Path) -> None:
    recipe = narrowing()
    run, whole = Run(recipe, scratch=tmp_path), Run(recipe)
    student = recipe.steps[0].apply(run.load_base(), run)
    teacher = TeacherModel(run)
    ids_BT = torch.arange(student.config.vocab_size)[None, :100]
    with torch.no_grad():
        said, wanted = (model(input_ids=ids_BT).logits for model in (teacher.load(), student))
    torch.testing.assert_close(said, wanted)
    assert teacher.config.vocab_size == student.config.vocab_size < whole.config.vocab_size
    assert teacher.identity() != TeacherModel(whole).identity()  # what is kept on disk of one is not read for the other


def test_teachers_that_cannot_lose_the_tokens_are_refused(narrowing: Callable[..., llmlite.Recipe], model_folder: Path) -> None:
    narrowing(teacher_device_map="cpu").check()
    narrowing(teacher=str(model_folder), divergence="uld", cache="none").check()
    for options, words in (
        ({"teacher": str(model_folder)}, "tokens have gone from the student's vocabulary"),
        ({"teacher_quantization": "nf4"}, "teacher_quantization with teacher: base behind prune.vocabulary is not built"),
        ({"teacher_device_map": "auto"}, "teacher_device_map with teacher: base behind prune.vocabulary is not built"),
    ):
        with pytest.raises(ConfigError, match=words):
            narrowing(**options).check()


def test_texts_can_be_named_and_texts_that_nobody_can_narrow_for_are_refused(model_folder: Path, tmp_path: Path, pairs_file: Path) -> None:
    (tmp_path / "one.txt").write_text("zebra")
    recipe = llmlite.Recipe(
        model=str(model_folder), data=Data(train=str(pairs_file)), steps=(llmlite.PruneVocabulary(text=str(tmp_path / "one.txt"), multiple_of=1),)
    )
    run, config = Run(recipe), Run(recipe).config
    kept = recipe.steps[0]._chosen(run, run.tokenizer, config)
    wide = llmlite.PruneVocabulary(text=str(tmp_path / "one.txt"), keep_first=320, multiple_of=1)._chosen(run, run.tokenizer, config)
    assert set(run.tokenizer("zebra")["input_ids"]) <= set(kept) < set(wide) == set(range(len(run.tokenizer)))
    slow = Run(recipe)
    slow.__dict__["tokenizer"] = type("Slow", (), {"all_special_ids": []})()
    from llmlite.step import ModelPlan

    with pytest.raises(ConfigError, match=r"(?s)prune\.vocabulary.*no tokenizer\.json"):
        recipe.steps[0].check(ModelPlan(config), slow)


def test_a_finished_run_is_measured_again_as_it_measured_itself_and_on_other_texts_too(finished: tuple[Path, llmlite.Recipe, Report], tmp_path: Path) -> None:
    from llmlite.side_by_side import evaluate

    out, _, report = finished
    again = evaluate(out, each_step=True, answers=1, batch_sizes=(1,), repeats=1).models
    for model, row in zip(again.values(), report.rows, strict=True):  # the base with all its tokens, then the steps with those that are left
        assert model["perplexity"] == pytest.approx(row.perplexity, rel=1e-4)
        assert row.kl is None or model["kl"] == pytest.approx(row.kl, rel=1e-2, abs=1e-4)
    (tmp_path / "other.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 2, encoding="utf-8")
    other = evaluate(out, text=str(tmp_path / "other.txt"), window=16, answers=1, batch_sizes=(1,), repeats=1).models
    assert other["this"]["tokens"] == other["base"]["tokens"]  # of the base's tokenizer, both of them
