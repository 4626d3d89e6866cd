"""Recipes: where an option goes, who wins, and that a preset and its YAML are the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmlite
from llmlite import recipes
from llmlite.errors import ConfigError
from llmlite.recipe import Recipe
from llmlite.step import STEPS, step_class

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("preset", "module"), recipes.PRESETS.items())
def test_a_preset_and_its_yaml_are_the_same_recipe(preset: str, module: str) -> None:
    assert getattr(recipes, preset)().to_mapping() == Recipe.from_file(ROOT / "recipes" / f"{module}.yaml").to_mapping()
    assert getattr(recipes, preset).name == module


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_starts_with_its_command_and_is_a_valid_recipe(file: Path) -> None:
    assert file.read_text().startswith(f"# llmlite run recipes/{file.name}\n")
    assert Recipe.from_file(file).steps


@pytest.mark.parametrize("name", STEPS)
def test_every_short_name_of_a_step_leads_to_a_step_with_a_first_line(name: str) -> None:
    assert (step_class(name).__doc__ or "").strip()


def test_flags_win_over_the_file_and_the_file_over_the_preset() -> None:
    file = ("a.yaml", {"learning_rate": 0.1, "seed": 7})
    recipe = llmlite.LoraInt4.from_options(file, ("flags", {"seed": 8}))
    assert (recipe.steps[1].learning_rate, recipe.seed, recipe.steps[1].r) == (0.1, 8, 16)


def test_short_options_reach_steps_data_and_model() -> None:
    recipe = llmlite.LoraInt4(r=4, scheme="fp4", max_length=64, revision="v1")
    assert (recipe.steps[1].r, recipe.steps[0].scheme, recipe.data.max_length, recipe.model.revision) == (4, "fp4", 64, "v1")


def test_other_data_leaves_the_limits_that_were_meant_for_the_offline_text() -> None:
    assert llmlite.LoraInt4().data.max_train_rows == 176
    assert llmlite.LoraInt4(data="chat.jsonl").data.max_train_rows is None
    assert llmlite.LoraInt4(data="chat.jsonl", max_train_rows=5).data.max_train_rows == 5


def test_an_option_of_two_steps_must_say_which() -> None:
    layer = {"steps": ["lora", "lora"], "r": 4}
    with pytest.raises(ConfigError, match="'r' is an option of several steps. Say which: steps.0.r, steps.1.r"):
        Recipe.from_options(("flags", layer))


def test_problems_of_all_layers_and_all_parts_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_options(
            ("f.yaml", {"modle": "x", "seed": -1, "data": {"max_lenght": 3}, "steps": [{"step": "lorra"}, {"step": "lora", "r": "8"}]}),
            ("flags", {"steps.3.keep": 1, "steps.1.lr": 2}),
        )
    text = str(caught.value)
    assert "7 problems" in text
    for part in (
        "f.yaml: no option 'modle'. Did you mean 'model'?",
        "flags: no step 'steps.3'. The recipe has 2 steps, numbered from 0.",
        "data: no option 'max_lenght'. Did you mean 'max_length'?",
        "steps[0]: no step 'lorra'. Did you mean 'lora'?",
        "steps[1] lora: r='8' should be a whole number.",
        "no option 'lr'",
        "seed=-1 should be at least 0.",
    ):
        assert part in text


@pytest.mark.parametrize("part", ["data", "model"])
@pytest.mark.parametrize("value", [None, 3, [1, 2], [None], ["x", 1]])
def test_data_or_a_model_that_is_neither_name_nor_mapping_is_named_beside_short_options(part: str, value: object) -> None:
    with pytest.raises(ConfigError) as found:
        Recipe.from_options(("file", {"steps": ["quantize"], part: value}), ("flags", {"max_length": 64, "revision": "main", "no_such_option": 1}))
    assert len(found.value.problems) == 2
    assert found.value.problems[0].startswith("flags: no option 'no_such_option'")
    assert found.value.problems[1] == f"{part}={value!r} should be a name, or a mapping of options."


def test_a_gate_that_is_no_mapping_is_told_what_it_should_be() -> None:
    with pytest.raises(ConfigError) as found:
        Recipe.from_options(("file", {"steps": [{"step": "quantize", "gate": "abc", "double_quant": 3}], "gate": False}))
    assert [problem.split(". ")[0] for problem in found.value.problems] == [
        "steps[0] quantize: gate='abc' should be a mapping of its options",
        "steps[0] quantize: double_quant=3 should be true or false",
        "gate=False should be a mapping of its options",
    ]


def test_a_recipe_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="'steps' is empty"):
        Recipe.from_options(("x.yaml", {"model": "m"}))


def test_a_step_of_ones_own_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_steps.py").write_text(
        "from llmlite.config import settings\nfrom llmlite.step import Step\n\n\n"
        "@settings\nclass Mine(Step):\n    'Mine.'\n\n    amount: int = 1\n    'How much.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Recipe.from_options(("x.yaml", {"steps": [{"step": "my_steps:Mine", "amount": 3}]}))
    assert recipe.steps[0].amount == 3
    assert recipe.identity()["steps"] == [{"step": "my_steps:Mine", "amount": 3}]


def test_the_identity_ignores_where_the_result_goes_and_nothing_else() -> None:
    base = llmlite.LoraInt4()
    assert base.identity() == llmlite.LoraInt4(output_dir="elsewhere", dry_run=True).identity()
    assert base.identity() != llmlite.LoraInt4(r=8).identity()
    assert base.identity() != llmlite.LoraInt4(seed=1).identity()
