"""Broken recipes, by the thousand: every one is refused with a `ConfigError` that a person can read, or it is not broken."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlite.config import read_yaml
from llmlite.errors import ConfigError
from llmlite.recipe import Recipe
from llmlite.step import STEPS, parse_step, step_class

ROOT = Path(__file__).parents[2]
GOOD = sorted((ROOT / "recipes").glob("*.yaml"))
BAD: list[Any] = [
    None,
    "",
    "text",
    "-1",
    -1,
    0,
    1.5,
    10**12,
    math.nan,
    math.inf,
    -math.inf,
    True,
    [],
    [1, "a"],
    {},
    {"a": 1},
    b"\xff",
    "ünïcödé\x00",
    "x" * 5000,
]


def refusal(build: Callable[[], Any]) -> ConfigError | None:
    """The error, or None for a recipe that is good after all; any other error is a failure of the test."""
    try:
        build()
    except ConfigError as error:
        return error
    return None


def require_readable(error: ConfigError | None, file: str) -> None:
    if error is not None:
        assert file in str(error)
        assert all(problem.strip() and len(problem) < 2000 for problem in error.problems)
        assert "pydantic" not in str(error)


@pytest.mark.parametrize("name", STEPS)
def test_every_option_of_every_step_takes_a_wrong_value_with_a_sentence(name: str) -> None:
    refused = tried = 0
    for field in dataclasses.fields(step_class(name)):
        for value in BAD:
            step, problems = parse_step({"step": name, field.name: value}, 0)
            tried += 1
            refused += step is None
            assert (step is None) == bool(problems), (field.name, value)
            assert all(problem.startswith(f"steps[0] {name}: ") and len(problem) < 2000 for problem in problems), problems
    assert refused > tried / 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_option_takes_what_is_no_finite_number(value: float) -> None:
    for name in STEPS:
        for field in dataclasses.fields(step_class(name)):
            assert parse_step({"step": name, field.name: value}, 0)[0] is None, (name, field.name)
    for field in dataclasses.fields(Recipe):
        with pytest.raises(ConfigError):
            Recipe.from_options(("file", {"steps": [{"step": "lora"}], field.name: value}))


@pytest.mark.parametrize("file", GOOD, ids=lambda file: file.stem)
def test_every_key_of_every_recipe_misspelt_is_refused_by_name(file: Path) -> None:
    good = read_yaml(file)

    def keys(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(value, dict):
            return [(*path, key) for key in value] + [found for key in value for found in keys(value[key], (*path, key))]
        return [found for index, item in enumerate(value) for found in keys(item, (*path, index))] if isinstance(value, list) else []

    for path in keys(good):
        mutant: Any = copy.deepcopy(good)
        place = mutant
        for part in path[:-1]:
            place = place[part]
        wrong = path[-1][:-1] + "qz"
        place[wrong] = place.pop(path[-1])
        with pytest.raises(ConfigError) as refused:
            Recipe.from_options((file.name, mutant))
        assert wrong in str(refused.value) or path[-1] in str(refused.value), (path, str(refused.value))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=st.sampled_from(GOOD), data=st.data())
def test_a_recipe_with_a_part_replaced_by_anything_is_refused_or_good(file: Path, data: st.DataObject) -> None:
    mutant: Any = read_yaml(file)
    place, key = mutant, data.draw(st.sampled_from(sorted(mutant)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
    place[key] = data.draw(VALUES)
    require_readable(refusal(lambda: Recipe.from_options(("mutant.yaml", mutant))), "mutant.yaml")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(GOOD), data=st.data())
def test_a_yaml_file_with_bytes_cut_added_or_changed_is_refused_or_good(file: Path, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["cut", "change", "add"]))
        if kind == "cut":
            del content[place : place + data.draw(st.integers(1, 40))]
        elif kind == "change":
            content[place] = data.draw(st.integers(0, 255))
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=6))
        if not content:
            break
    mutant = tmp_path / "mutant.yaml"
    mutant.write_bytes(bytes(content))
    require_readable(refusal(lambda: Recipe.from_file(mutant)), "mutant.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "steps: !!python/object/apply:os.system ['echo owned']",
        "!!python/name:os.system",
        "steps: [{step: !!python/module:os}]",
        "a: &a [*a]\nsteps: *a",
        "x: &x {y: 1}\nsteps: [{<<: *x, step: lora}]",
        "steps: [" * 2000,
        "? [a]\n: b",
        "steps:\n\t- lora",
        "--- a\n--- b",
        "%YAML 9.9\n---\nsteps: []",
        "steps: [{step: 'os:system'}]",
        "steps: [{step: '../../etc/passwd:X'}]",
        "steps: [{step: lora}]\nmodel: {name: [1]}",
        "steps: [{step: lora, step: lora}]",
        "\x00\x01",
        "[]",
        "12",
        "",
    ],
)
def test_yaml_that_attacks_or_confuses_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "attack.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"attack\.yaml"):
        Recipe.from_file(file)


def test_a_billion_laughs_stay_small(tmp_path: Path) -> None:
    file = tmp_path / "laughs.yaml"
    file.write_text(
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefg", "bcdefgh", strict=True)) + "steps: *h"
    )
    with pytest.raises(ConfigError) as refused:
        Recipe.from_file(file)
    assert len(str(refused.value)) < 20_000


def test_a_good_recipe_is_not_refused() -> None:
    for file in GOOD:
        assert yaml.safe_load(file.read_text())
        Recipe.from_file(file)
