"""Settings: every problem is reported at once, in words that teach, and YAML says what it means."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlite.adapters.lora import Lora
from llmlite.config import field_doc, fingerprint, near, parse_flag, read_yaml, to_yaml
from llmlite.errors import ConfigError
from llmlite.quantization.bnb import Quantize
from llmlite.step import STEPS, step_class


def test_all_problems_of_one_call_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Lora(r=0, learning_rate="fast", lora_dropout=1.5, alpha=3)
    text = str(caught.value)
    assert text.startswith("Lora(...) has 4 problems")
    assert "r=0 should be at least 1. Rank of the adapter" in text
    assert "learning_rate='fast' should be a number" in text.replace("a valid number", "a number")
    assert "lora_dropout=1.5 should be below 1" in text
    assert "no option 'alpha'. Did you mean 'lora_alpha'?" in text


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    with pytest.raises(AttributeError):
        Quantize().scheme = "int8"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5e3),
        ("-2.5e-1", -0.25),
        ("3", 3),
        ("yes", True),
        ("abc", "abc"),
        ("2:4", "2:4"),
        ("0x1f", 31),
        ("1.5", 1.5),
        ("-7", -7),
        (".5", 0.5),
    ],
)
def test_yaml_reads_numbers_as_people_write_them(tmp_path: Path, text: str, value: object) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"key: {text}\n")
    assert read_yaml(file) == {"key": value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\na: 2\n", "line 2, column 1: the key 'a' is written twice"),
        (b"steps:\n\t- step: lora\n", "line 2, column 1: found character '\\t' that cannot start any token. YAML indents by spaces, not by tabs."),
        (b"a: &x {b: 1}\nc: {<<: *x}\n", "line 2, column 5: merge keys (<<) are not read. Write the options out"),
        (b"a: 1\n---\na: 2\n", "line 2, column 1: expected a single document in the stream, but found another document"),
        (b"a: [1, 2\n", "line 2"),
        (b"", "the file is empty"),
        (b"42\n", "should be a mapping of options, got a number"),
        (b"- 1\n- 2\n", "should be a mapping of options, got a list"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        (b"? [1, 2]\n: 3\n", "a key should be a name"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="bad.yaml has 1 problem") as caught:
        read_yaml(file)
    assert message in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "prune_heads.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="prune_heads.yaml'"):
        read_yaml(tmp_path / "prune_haeds.yaml")


TEXT = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")))  # PyYAML folds control characters


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner))
)
def test_what_is_written_as_yaml_is_read_back_the_same(value: object) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.yaml"
        file.write_text(to_yaml({"value": value}), encoding="utf-8")
        assert read_yaml(file) == {"value": value}


def test_a_flag_for_text_stays_text_and_a_list_becomes_a_list() -> None:
    assert parse_flag("123", takes_text=True) == "123"
    assert parse_flag("123", takes_text=False) == 123
    assert parse_flag("[q_proj, v_proj]", takes_text=True) == ["q_proj", "v_proj"]
    assert parse_flag("null", takes_text=True) is None


@pytest.mark.parametrize("text", ["2026-99-99", "9" * 5000, "!!int x", "[" * 3000, "&a [*a]", "[}"], ids=range(6))
@pytest.mark.parametrize("takes_text", [True, False])
def test_a_flag_that_yaml_cannot_read_is_text(text: str, takes_text: bool) -> None:
    assert parse_flag(text, takes_text) == text


def test_a_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_no_near_name_is_suggested_when_none_is_near() -> None:
    assert near("zzz", ["learning_rate", "scheme"]) is None
    assert near("learning-rat", ["learning_rate", "scheme"]) == "learning_rate"


def test_every_option_of_every_step_has_a_documentation() -> None:
    for name in STEPS:
        cls = step_class(name)
        assert [field.name for field in dataclasses.fields(cls) if not field_doc(cls, field.name)] == [], name
