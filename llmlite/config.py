"""Settings: frozen dataclasses that pydantic validates, written as YAML, flags or Python, with every problem reported at once.

A settings class is declared with `@settings`; the string under each field is its documentation and its command-line help. Three sources
are merged before anything is validated, the right one winning: the class's defaults, a YAML file, flags. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses
import yaml

from llmlite.errors import ConfigError, first_line

__all__ = [
    "default_of",
    "describe_field",
    "field_doc",
    "fingerprint",
    "from_mapping",
    "near",
    "parse_flag",
    "problems_of",
    "read_yaml",
    "settings",
    "shorten",
    "to_mapping",
    "to_yaml",
    "validate",
]

T = TypeVar("T")

_CONFIG = pydantic.ConfigDict(
    extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True, arbitrary_types_allowed=True, allow_inf_nan=False
)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Turn a class into a frozen, keyword-only, validated dataclass whose wrong values raise `ConfigError`, all of them together."""
    made = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=_CONFIG)
    validated_init = made.__init__

    @functools.wraps(validated_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        expand = getattr(type(self), "expand_options", None)
        try:
            validated_init(self, *args, **(expand(kwargs) if expand else kwargs))
        except pydantic.ValidationError as error:
            raise ConfigError(f"{type(self).__name__}(...)", problems_of(error, type(self))) from None

    made.__init__ = init  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def validate(cls: type[T], mapping: Mapping[str, Any], where: str) -> tuple[T | None, list[str]]:
    """Build `cls` from plain values.

    Args:
        cls: a settings class.
        mapping: field names to plain values, as a YAML file gives them.
        where: what to write before each problem, for instance ``steps[0] prune.heads``; empty for none.

    Returns:
        The instance and no problems, or None and every problem as a sentence.
    """
    bad_keys = [key for key in mapping if not isinstance(key, str)]
    if bad_keys:
        return None, [_placed(where, f"the key {key!r} should be a name.") for key in bad_keys]
    try:
        return cls(**mapping), []
    except ConfigError as error:
        return None, [_placed(where, problem) for problem in error.problems]


def from_mapping(cls: type[Any], switched: bool = False) -> pydantic.BeforeValidator:
    """For a field that holds settings: lets it be given as a mapping of theirs, and None as the defaults.

    Args:
        cls: the settings.
        switched: the field is off or on: true stands for the defaults, false and None for None.
    """

    def made(value: Any) -> Any:
        if switched and (value is None or isinstance(value, bool)):
            return cls() if value else None
        if switched and not isinstance(value, Mapping | cls):
            raise ValueError("be true, false or a mapping of its options")
        if value is not None and not isinstance(value, Mapping | cls):
            raise ValueError("be a mapping of its options")
        if not isinstance(value, Mapping):
            return cls() if value is None else value
        found, problems = validate(cls, value, "")
        if found is None:
            raise ValueError("be right: " + " ".join(problems))
        return found

    return pydantic.BeforeValidator(made)


def problems_of(error: pydantic.ValidationError, cls: type[Any]) -> list[str]:
    """One sentence for each thing pydantic found: name, value got, value wanted, what the field means, the near spelling of a name."""
    sentences: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"] if not _is_union_branch(part))
        sentences.setdefault(path, []).append(item)
    return [_sentence(path, items, cls) for path, items in sentences.items()]


def _is_union_branch(part: int | str) -> bool:
    # pydantic names the branch of a union in the location ("literal['x']", "function-before[...]"); a user never wrote that.
    return isinstance(part, str) and (not part.isidentifier() or part in {"int", "float", "str", "bool", "none"})


def _sentence(path: str, items: Sequence[Any], cls: type[Any]) -> str:
    item = items[0]
    if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        return unknown_option(path, _field_names(cls))
    if item["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
        return f"'{path}' is missing. {describe_field(cls, path)}".rstrip()
    wanted = " or ".join(dict.fromkeys(_wanted(i) for i in items))
    if not path:
        return wanted[:1].upper() + wanted[1:]
    return f"{path}={_short(item['input'])} should {wanted.rstrip('.')}. {describe_field(cls, path)}".rstrip()


def _wanted(item: Any) -> str:
    context = item.get("ctx", {})
    match item["type"]:
        case "value_error" | "assertion_error":
            return str(context.get("error", item["msg"]))
        case "greater_than":
            return f"be above {context['gt']}"
        case "greater_than_equal":
            return f"be at least {context['ge']}"
        case "less_than":
            return f"be below {context['lt']}"
        case "less_than_equal":
            return f"be at most {context['le']}"
    return (
        re.sub(r"^Input should (be )?", "be ", str(item["msg"]))
        .replace("a valid integer", "a whole number")
        .replace("a valid boolean", "true or false")
        .replace("a valid ", "a ")
        .replace("a tuple", "a list")
    )


def field_doc(cls: type[Any], name: str) -> str:
    """The documentation of a field: the string under it, on one line; empty for an unknown field."""
    for owner in cls.__mro__:  # the text stands in the class that declares the field, which may be a base
        info = vars(owner).get("__pydantic_fields__", {}).get(name)
        if info and info.description:
            return " ".join(info.description.split())
    return ""


def describe_field(cls: type[Any], path: str) -> str:
    """The first sentence of a field's documentation, or nothing."""
    return re.split(r"(?<=[.!?])\s", field_doc(cls, path.split(".")[0]), maxsplit=1)[0]


def _field_names(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The sentence for a name nobody knows, with the near spelling or the list."""
    known = sorted(known)
    guess = near(name, known)
    if guess:
        return f"no option '{name}'. Did you mean '{guess}'?"
    return f"no option '{name}'. Known: {', '.join(known)}."


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None when none looks alike."""
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _placed(where: str, problem: str) -> str:
    return f"{where}: {problem}" if where else problem


def _short(value: object) -> str:
    return shorten(repr(value))


def shorten(text: str, limit: int = 80) -> str:
    """At most `limit` characters of what somebody gave us, for a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


# YAML ---------------------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.1 makes it text) and refuses a key written twice (PyYAML keeps the last, silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # merges of merges unfold to billions while they are read
                wanted = "merge keys (<<) are not read. Write the options out; an alias (*name) may stand for a whole step or mapping"
                raise yaml.constructor.ConstructorError(None, None, wanted, key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key should be a name", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {first: list(known) for first, known in _class.yaml_implicit_resolvers.items()}
    _class.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))

# YAML 1.1 reads 2:4 as minutes and seconds, 124; here it is a pattern of zeros, and text. The dumper goes on quoting it, for readers of other tools.
_INT = re.compile(r"^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _INT if tag.endswith(":int") else pattern) for tag, pattern in known] for first, known in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ConfigError: the file is missing, is not UTF-8, is not YAML (with line and column), repeats a key, or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path(".")
        guess = near(path.name, [p.name for p in folder.glob("*.y*ml")])
        raise ConfigError(str(path), ["no such file." + (f" Did you mean '{folder / guess}'?" if guess else "")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"not UTF-8 text (byte {error.start}). Is it a YAML file?"]) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ConfigError(shorten(repr(str(path)), 200), [f"cannot be read: {getattr(error, 'strerror', None) or error}."]) from None
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = str(error.problem)
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        advice = " YAML indents by spaces, not by tabs." if r"'\t'" in problem else ""
        raise ConfigError(str(path), [f"{place}{problem}.{advice}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"not YAML: {first_line(error)}."]) from None
    if not _is_small(loaded):
        raise ConfigError(str(path), [f"its aliases (&name, *name) unfold to more than {_MOST_VALUES:,} values."])
    if loaded is None:
        raise ConfigError(str(path), ["the file is empty. A recipe has at least 'steps'."])
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), [f"should be a mapping of options, got {_KINDS.get(type(loaded), f'a {type(loaded).__name__}')}."])
    return loaded


_MOST_VALUES = 20_000
_KINDS = {int: "a number", float: "a number", str: "text", bool: "yes or no"}


def _is_small(value: Any) -> bool:
    """Whether a loaded file holds few enough values: aliases can unfold to billions, or to themselves."""
    left, rest = _MOST_VALUES, [value]
    while rest and left:
        item = rest.pop()
        left -= 1
        rest += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return not rest


def parse_flag(text: str, takes_text: bool) -> Any:
    """What a flag's text means: YAML's reading of it, except that an option that takes text keeps numbers and words, and what YAML cannot read is text."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: looks like a date or a number and is none
        return text
    if not _is_small(value):
        return text
    if value is None:
        return None if text.strip() in {"null", "None", "~"} else text
    return text if takes_text and not isinstance(value, list | dict) else value


# Out ----------------------------------------------------------------------------------------------------------------------------------


def to_mapping(value: Any, name_of: Callable[[type[Any]], str | None] = lambda _: None, defaults: bool = False) -> Any:
    """Plain values of a settings object, ready for YAML or JSON.

    Args:
        value: settings object, or anything inside one.
        name_of: the short name written as ``step:`` for classes that have one.
        defaults: write fields that equal their default too.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        name = name_of(type(value))
        if name:
            out["step"] = name
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if defaults or not _is_default(item, field):
                out[field.name] = to_mapping(item, name_of, defaults)
        return out
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item, name_of, defaults) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(item, name_of, defaults) for item in value]
    return str(value) if isinstance(value, Path) else value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value a field has when nobody sets it; `dataclasses.MISSING` for a field that must be set."""
    default = field.default
    if isinstance(default, pydantic.fields.FieldInfo):
        return default.get_default(call_default_factory=True, validated_data={})
    return default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_default(item: Any, field: dataclasses.Field[Any]) -> bool:
    default = default_of(field)
    return bool(default is not dataclasses.MISSING and type(item) is type(default) and item == default)


def to_yaml(mapping: Mapping[str, Any]) -> str:
    """YAML in the order given, that `read_yaml` reads back as the same values."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that change when any of the plain values changes."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
