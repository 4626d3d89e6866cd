"""Losses inside the models: what is seen is what transformers shows, projections learn and go, a resume is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmlite
from llmlite.context import Run
from llmlite.distillation.hidden import attention_transfer, hidden_cosine, hidden_mse
from llmlite.distillation.inner import InnerLosses, InnerWeights, layer_pairs
from llmlite.errors import Interrupted
from llmlite.training import trainer as trainer_module
from tests.conftest import build_tiny, save_tiny, token_ids


def test_layers_are_paired_by_depth_last_with_last():
    assert layer_pairs(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert layer_pairs(2, 6) == ((0, 2), (1, 5))
    assert layer_pairs(4, 2)[-1] == (3, 1)
    assert layer_pairs(24, 30)[0] == (0, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_inner_losses_compare_what_transformers_itself_shows(family, kind):
    student, teacher = build_tiny(family, seed=1), build_tiny(family, seed=2)
    before = student.config._attn_implementation
    ids_BT = token_ids()
    keep_N = torch.arange(ids_BT.numel()) % 3 > 0
    pairs = ((0, 1), (1, 0))
    inner = InnerLosses(student, teacher, pairs, InnerWeights(2.0, 3.0, kind))
    with torch.no_grad():
        with inner.watching(student):
            student(input_ids=ids_BT, use_cache=False)
        with inner.watching_teacher():
            teacher(input_ids=ids_BT, use_cache=False)
        shown = [model(input_ids=ids_BT, use_cache=False, output_hidden_states=True, output_attentions=True) for model in (student, teacher)]
    found = inner.losses({}, keep_N)
    compare = hidden_cosine if kind == "cosine" else lambda s, t: hidden_mse(s, t, normalise=True)
    hidden = sum(compare(shown[0].hidden_states[s + 1].flatten(0, 1), shown[1].hidden_states[t + 1].flatten(0, 1))[keep_N].sum() for s, t in pairs) / 2
    attention = sum(attention_transfer(shown[0].attentions[s], shown[1].attentions[t]).flatten()[keep_N].sum() for s, t in pairs) / 2
    assert (found["hidden"][0], found["attention"][0]) == (2.0, 3.0)
    torch.testing.assert_close(found["hidden"][1], hidden)
    torch.testing.assert_close(found["attention"][1], attention)
    inner.close()
    assert student.config._attn_implementation == before


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another width and depth with the same tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("models") / "wide", hidden_size=96, num_hidden_layers=4, vocab_size=352)


def run_of(model: Path, data: Path, step: Any, scratch: Path) -> Run:
    recipe = llmlite.Recipe(model=str(model), data=llmlite.Data(train=str(data), max_length=64, evaluation_rows=6), steps=[step])
    return Run(recipe, scratch=scratch)


@pytest.mark.parametrize("lora", [False, True])
def test_projections_are_trained_with_the_student_and_gone_afterwards(model_folder, pairs_file, wide_teacher, tmp_path, lora, monkeypatch):
    """Stopped after two of four steps and continued, the student ends where an undisturbed run ends."""
    step = llmlite.DistillWhiteBox(
        teacher=str(wide_teacher),
        hidden_weight=1.0,
        attention_weight=0.5,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        adapter=llmlite.Lora(r=4) if lora else None,
    )

    def trained(name: str) -> dict[str, torch.Tensor]:
        run = run_of(model_folder, pairs_file, step, tmp_path / name)
        return {key: value.clone() for key, value in step.apply(run.load_base(), run).state_dict().items()}

    through = trained("through")
    assert not [name for name in through if "projection" in name]

    class StopsAtTwo(trainer_module.StopRequest):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            self.asked = state.global_step == 2
            return super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "StopRequest", StopsAtTwo)
        with pytest.raises(Interrupted):
            trained("stopped")
    saved = tmp_path / "stopped" / "trainer" / "checkpoint-2" / "distillation_projections.safetensors"
    assert saved.is_file()
    continued = trained("stopped")
    for name, value in through.items():
        torch.testing.assert_close(continued[name], value, rtol=0, atol=1e-6, msg=name)


def test_matching_hidden_states_brings_them_nearer(model_folder, pairs_file, tmp_path):
    seen: list[float] = []
    original = InnerLosses.losses

    def noted(self: InnerLosses, inputs: Any, keep_N: Any) -> Any:
        found = original(self, inputs, keep_N)
        seen.append(float(found["hidden"][1].detach()) / int(keep_N.sum()))
        return found

    step = llmlite.DistillWhiteBox(hidden_weight=1.0, ce_weight=0, kd_weight=0, max_steps=12, learning_rate=3e-3, layer_map=((0, 0), (1, 2)))
    run = run_of(model_folder, pairs_file, step, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InnerLosses, "losses", noted)
        step.apply(run.load_base(), run)
    assert seen[-1] < 0.7 * seen[0]
