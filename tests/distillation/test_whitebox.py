"""Distilling towards the base: the student comes nearer, the teacher stays, the result is stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import MixtralForCausalLM

import llmlite
from llmlite.config import settings
from llmlite.context import Run
from llmlite.distillation.inner import InnerLosses, InnerWeights
from llmlite.distillation.teacher import TeacherModel
from llmlite.errors import ConfigError, UnsupportedModel
from llmlite.recipe import Recipe
from llmlite.recipes.distill_whitebox import DistillWhiteBox as Preset
from llmlite.step import ModelPlan, Step
from tests.conftest import build_tiny, build_tokenizer, save_tiny
from tests.distillation.test_uld import other_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


@settings
class Noise(Step):
    """Damage every weight a little, so that there is something to heal."""

    amount: float = 0.3
    """Standard deviation, relative to the weight's own."""

    def check(self, model: ModelPlan, run: Any) -> ModelPlan:
        """Nothing changes its shape."""
        return model

    def apply(self, model: Any, run: Any) -> Any:
        """Add noise."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter += self.amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
        return model


def run(model: Path, data: Path, out: Path, *steps: Step) -> Any:
    recipe = llmlite.Recipe(
        model=str(model), data=llmlite.Data(train=str(data), max_length=64, evaluation_rows=6), steps=[Noise(), *steps], output_dir=str(out)
    )
    return recipe.run()


def problems_of(model: Path, data: Path, *steps: Any) -> str:
    """What `check` says against these steps."""
    recipe = llmlite.Recipe(model=str(model), data=llmlite.Data(train=str(data), max_length=64), steps=list(steps))
    with pytest.raises(ConfigError) as caught:
        recipe.check()
    return str(caught.value)


def applied(model: Path, data: Path, scratch: Path, step: Step) -> tuple[Any, Run]:
    """The step alone on the model, without the measuring around it."""
    recipe = llmlite.Recipe(model=str(model), data=llmlite.Data(train=str(data), max_length=64, evaluation_rows=6), steps=[step])
    recipe.check()
    run = Run(recipe, scratch=scratch)
    return step.apply(run.load_base(), run), run


def test_distilling_brings_a_damaged_model_nearer_to_the_base(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    step = llmlite.DistillWhiteBox(max_steps=12, learning_rate=3e-3, ce_weight=0.0, kd_weight=1.0, per_device_train_batch_size=4)
    report = run(model_folder, pairs_file, tmp_path / "out", step)
    _, damaged, healed = report.rows
    assert healed.kl < 0.5 * damaged.kl
    assert report.reload_difference < 1e-4


def test_finetuning_all_weights_lowers_the_perplexity(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = run(model_folder, pairs_file, tmp_path / "out", llmlite.Finetune(max_steps=12, learning_rate=3e-3))
    assert report.rows[2].perplexity < 0.8 * report.rows[1].perplexity


def test_training_in_bfloat16_gives_back_bfloat16_weights_and_untouched_frequencies(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    data = llmlite.Data(train=str(pairs_file), max_length=64, evaluation_rows=6)
    step = llmlite.Finetune(max_steps=1, per_device_train_batch_size=1)
    context = Run(llmlite.Recipe(model=llmlite.Model(name=str(model_folder), dtype="bfloat16"), data=data, steps=[step]), scratch=tmp_path)
    model = context.load_base()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = step.apply(model, context)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.bfloat16}
    assert before
    for name, buffer in trained.named_buffers():
        assert buffer.dtype == before[name].dtype == torch.float32
        assert torch.equal(buffer, before[name])


def test_a_step_with_nothing_to_learn_is_refused(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    recipe = llmlite.Recipe(
        model=str(model_folder), data=str(pairs_file), max_length=64, steps=[llmlite.DistillWhiteBox(ce_weight=0, kd_weight=0)], output_dir=str(tmp_path / "x")
    )
    with pytest.raises(ConfigError, match="nothing to learn"):
        recipe.check()


def test_every_problem_of_the_losses_comes_at_once(model_folder: Path, pairs_file: Path) -> None:
    said = problems_of(model_folder, pairs_file, llmlite.DistillWhiteBox(beta=0.3, kd_weight=0.0, layer_map=((0, 0),), on_policy=0.5, cache="top_k"))
    for part in ("beta=0.3 is an option of generalised_jsd", "kd_weight=0 leaves nothing", "layer_map pairs layers", "on_policy=0.5", "cannot serve on_policy"):
        assert part in said
    said = problems_of(model_folder, pairs_file, llmlite.DistillWhiteBox(divergence="reverse_kl", cache="top_k", hidden_weight=1.0, layer_map=((0, 3),)))
    for part in ("cannot serve hidden_weight", "[0, 3]: the student has layers 0 to 2, the teacher 0 to 2"):
        assert part in said
    assert "needs the whole distribution" in problems_of(model_folder, pairs_file, llmlite.DistillWhiteBox(divergence="logit_mse", cache="top_k"))


def test_quantized_weights_are_refused_without_an_adapter_and_taken_with_one(model_folder: Path, pairs_file: Path) -> None:
    quantize = llmlite.Quantize(scheme="int8", report_sequences=0)
    assert "Set adapter: lora" in problems_of(model_folder, pairs_file, quantize, llmlite.DistillWhiteBox())
    assert "already carries an adapter" in problems_of(model_folder, pairs_file, llmlite.Lora(), llmlite.DistillWhiteBox(adapter="lora"))
    data = llmlite.Data(train=str(pairs_file), max_length=64)
    plan = llmlite.Recipe(model=str(model_folder), data=data, steps=[quantize, llmlite.DistillWhiteBox(adapter=llmlite.Lora(r=4), max_steps=1)]).check()
    assert plan.rows[2]["adapters"]
    assert "rank 4 on 21 layers" in plan.rows[2]["notes"]


def test_a_teacher_of_no_known_family_that_makes_something_else_of_its_logits_is_refused(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Run(llmlite.Recipe(model=str(model_folder), data=str(pairs_file), steps=[llmlite.DistillWhiteBox()]))
    teacher = TeacherModel(student, str(save_tiny(tmp_path / "teacher", "mixtral")))
    teacher.load()
    forward = MixtralForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(MixtralForCausalLM, "forward", doubled)
    with pytest.raises(UnsupportedModel, match=r"^teacher '.*': mixtral changes its logits .* distill\.blackbox, teacher: serve:"):
        teacher.load()


def test_a_teacher_with_another_tokenizer_is_refused_unless_the_loss_is_made_for_it(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", vocab_size=320)
    other_tokenizer().save_pretrained(teacher)
    said = problems_of(model_folder, pairs_file, llmlite.DistillWhiteBox(teacher=str(teacher)))
    assert "different tokenizers" in said
    assert "divergence: uld" in said
    student, run = applied(model_folder, pairs_file, tmp_path / "work", llmlite.DistillWhiteBox(teacher=str(teacher), divergence="uld", max_steps=2))
    assert run.notes["optimizer_steps"] == 2
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_a_teacher_of_another_family_teaches_unless_it_would_mix_packed_examples(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    teachers = {family: save_tiny(tmp_path / family, family) for family in ("qwen3", "opt", "mixtral")}
    for family, problem in (("qwen3", None), ("opt", "does not keep packed examples apart"), ("mixtral", "does not keep packed examples apart")):
        for packing in (True, False):
            data = llmlite.Data(train=str(pairs_file), max_length=64, packing=packing)
            recipe = llmlite.Recipe(model=str(model_folder), data=data, steps=[llmlite.DistillWhiteBox(teacher=str(teachers[family]), max_steps=1)])
            if packing and problem:
                with pytest.raises(ConfigError, match=problem):
                    recipe.check()
                continue
            recipe.check()
            run = Run(recipe, scratch=tmp_path / f"{family}-{packing}")
            assert recipe.steps[0].apply(run.load_base(), run) is not None


def test_a_padded_teacher_and_the_same_one_unpadded_teach_the_same(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Rows of the embedding beyond the student's vocabulary change nothing, live or from a cache."""
    from transformers import AutoModelForCausalLM

    plain = save_tiny(tmp_path / "plain", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.resize_token_embeddings(384, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    build_tokenizer().save_pretrained(tmp_path / "padded")
    found = []
    for teacher, cache in ((plain, "none"), (tmp_path / "padded", "none"), (tmp_path / "padded", "hidden")):
        step = llmlite.DistillWhiteBox(teacher=str(teacher), cache=cache, max_steps=2, learning_rate=1e-3, ce_weight=0.0, kd_weight=1.0)
        student, _ = applied(model_folder, pairs_file, tmp_path / f"{teacher.name}-{cache}", step)
        found.append(torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in AutoModelForCausalLM.from_pretrained(model_folder).parameters()])
    moved = (found[0] - start).norm()
    assert moved > 0
    assert (found[1] - found[0]).norm() < 1e-3 * moved
    assert (found[2] - found[0]).norm() < 0.1 * moved


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_teacher_may_be_quantized_and_anywhere(model_folder: Path, pairs_file: Path, tmp_path: Path, quantization: Any) -> None:
    step = llmlite.DistillWhiteBox(teacher_quantization=quantization, teacher_device_map="auto", max_steps=1, ce_weight=0.0, kd_weight=1.0, cache="hidden")
    applied(model_folder, pairs_file, tmp_path / quantization, step)
    teacher = step.teacher_model(Run(Recipe(model=str(model_folder), steps=[step]))).load()
    assert teacher.is_quantized
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_an_adapter_is_distilled_on_a_quantized_base_then_trained_further_and_reloads(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    """noise -> quantize -> a new adapter -> the same adapter again: one stock adapter on the quantized base, measured after a reload in a fresh process."""
    options: dict[str, Any] = {"max_steps": 8, "learning_rate": 3e-3, "ce_weight": 0.0, "kd_weight": 1.0}
    recipe = llmlite.Recipe(
        model=str(model_folder),
        data=llmlite.Data(train=str(pairs_file), max_length=64, evaluation_rows=6),
        steps=[
            Noise(),
            llmlite.Quantize(scheme="nf4", calibrate=False, report_sequences=0),
            llmlite.DistillWhiteBox(adapter=llmlite.Lora(r=8), **options),
            llmlite.DistillWhiteBox(**options),
        ],
        output_dir=str(tmp_path / "out"),
    )
    report = recipe.run()
    _, _, quantized, once, twice = report.rows
    assert twice.kl < once.kl < quantized.kl
    assert report.reload_difference < 1e-3
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "02-quantize" in report.loading
    before = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert before["steps"][2]["adapter"]["step"] == "lora"


def test_options_reach_the_losses_from_yaml(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "steps:\n  - step: distill.whitebox\n    divergence: generalised_jsd\n    beta: 0.3\n    hidden_weight: 0.1\n    layer_map: [[0, 1], [2, 2]]\n"
    )
    step = Recipe.from_file(file).steps[0]
    assert step.layer_map == ((0, 1), (2, 2))
    teacher = save_signal(6)
    assert step.loss_with(teacher)({"rows": torch.zeros(1)}, torch.zeros(4, dtype=torch.int64)).options == {"beta": 0.3}
    assert Recipe.from_options(("again", Recipe.from_file(file).to_mapping())).steps[0] == step


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_the_log_shows_the_parts_of_the_loss(model_folder: Path, pairs_file: Path, tmp_path: Path, on_policy: float) -> None:
    from llmlite.distillation.on_policy import OnPolicy
    from llmlite.distillation.teacher import LiveTeacher
    from llmlite.training.trainer import train

    teacher = LiveTeacher(build_tiny("llama", vocab_size=320, seed=5))
    step = llmlite.DistillWhiteBox(
        max_steps=3, logging_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2, ce_weight=0.25, kd_weight=0.5, hidden_weight=2.0
    )
    run = Run(Recipe(model=str(model_folder), data=llmlite.Data(train=str(pairs_file), max_length=64), steps=[step]), scratch=tmp_path)
    student = run.load_base()
    inner = InnerLosses(student, teacher.model, ((0, 0),), InnerWeights(hidden=2.0))
    teacher.watching = inner.watching_teacher
    history = train(student, step, run, step.loss_with(teacher), OnPolicy(on_policy, 4, (2,), 2, inner))
    assert len(history) == 3
    for entry in history:
        ce = 0.0 if on_policy else 0.25 * entry["ce"]
        assert entry["loss"] == pytest.approx(ce + 0.5 * entry["forward_kl"] + 2.0 * entry["hidden"], rel=1e-3)


def save_signal(vocabulary: int) -> Any:
    """A teacher that says the same of everything."""
    from llmlite.distillation.objective import LogitsTeacher

    class Constant:
        def signal(self, inputs: Any, labels_N: Any) -> LogitsTeacher:
            return LogitsTeacher(torch.zeros(len(labels_N), vocabulary))

    return Constant()


def test_the_preset_prunes_then_heals(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    data = llmlite.Data(train=str(pairs_file), calibration=str(pairs_file), calibration_sequences=4, max_length=64, evaluation_rows=6)
    recipe = Preset(model=str(model_folder), data=data, keep=0.67, ce_weight=0.0, num_train_epochs=3.0, learning_rate=3e-3, output_dir=str(tmp_path / "out"))
    report = recipe.run()
    _, pruned, healed = report.rows
    assert healed.kl < pruned.kl
    assert healed.details["teacher_cache"] == "hidden"
    assert report.reload_difference < 1e-4
